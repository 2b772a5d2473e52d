#define RG_LEVEL neon
#include "level.h"
