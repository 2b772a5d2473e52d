#define RG_WIDE 1
#define RG_LEVEL vnni
#include "level.h"
