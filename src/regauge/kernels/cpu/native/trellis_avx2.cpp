#define RG_TRELLIS trellis_avx2
#include "trellis.h"
