#include "conv3x3_simd.h"

namespace titok {
const Conv3x3Kernel conv3x3_amx = conv::make_kernel();
}
