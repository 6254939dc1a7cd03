#include "index_propagation_simd.h"

namespace titok {
const IndexPropagationKernels index_propagation_portable = make_kernels();
}
