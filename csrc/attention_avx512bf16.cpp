#include "attention_simd.h"

namespace titok {
const AttentionKernel attention_avx512bf16 = attend::make_kernel();
}
