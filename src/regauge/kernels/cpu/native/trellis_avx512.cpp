#define RG_WIDE 1
#define RG_TRELLIS trellis_avx512
#include "trellis.h"
