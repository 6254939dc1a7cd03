#include "index_propagation_simd.h"

namespace titok {
const IndexPropagationKernels index_propagation_amx = make_kernels();
}
