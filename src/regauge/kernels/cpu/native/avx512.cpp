#define RG_WIDE 1
#define RG_LEVEL avx512
#include "level.h"
