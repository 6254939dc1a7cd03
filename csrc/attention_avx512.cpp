#include "attention_simd.h"

namespace titok {
const AttentionKernel attention_avx512 = attend::make_kernel();
}
