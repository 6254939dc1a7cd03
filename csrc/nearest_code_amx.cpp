#include "nearest_code_simd.h"

namespace titok {
const NearestCodeKernels nearest_code_amx = make_kernels();
}
