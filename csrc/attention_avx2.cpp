#include "attention_simd.h"

namespace titok {
const AttentionKernel attention_avx2 = attend::make_kernel();
}
