#define RG_LEAN 1
#define RG_LEVEL portable
#include "level.h"
