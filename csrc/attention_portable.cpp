#include "attention_simd.h"

namespace titok {
const AttentionKernel attention_portable = attend::make_kernel();
}
