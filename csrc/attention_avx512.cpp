#include "attention_simd.h"

namespace titok {
const AttentionRun attention_avx512 = attend::run;
}
