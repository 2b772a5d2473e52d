#define RG_WIDE 1
#define RG_TRELLIS trellis_vbmi
#include "trellis.h"
