#include "nearest_code_simd.h"

namespace titok {
const NearestCodeKernels nearest_code_avx512 = make_kernels();
}
