#define RG_TRELLIS trellis_portable
#include "trellis.h"
