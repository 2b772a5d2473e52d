#define RG_LEVEL avx2
#include "level.h"
