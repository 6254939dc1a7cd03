#include "index_propagation_simd.h"

namespace titok {
const IndexPropagationKernels index_propagation_avx2 = make_kernels();
}
