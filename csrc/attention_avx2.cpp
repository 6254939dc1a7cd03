#include "attention_simd.h"

namespace titok {
const AttentionRun attention_avx2 = attend::run;
}
