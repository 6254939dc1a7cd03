#include "nearest_code_simd.h"

namespace titok {
const NearestCodeKernels nearest_code_avx512bf16 = make_kernels();
}
