#include "attention_simd.h"

namespace titok {
const AttentionKernel attention_amx = attend::make_kernel();
}
