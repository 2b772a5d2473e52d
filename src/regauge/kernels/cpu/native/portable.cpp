#define RG_LEVEL portable
#include "level.h"
