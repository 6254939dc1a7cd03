#include "nearest_code_simd.h"

namespace titok {
const NearestCodeKernels nearest_code_avx512vnni = make_kernels();
}
