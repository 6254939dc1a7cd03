#include "attention_simd.h"

namespace titok {
const AttentionRun attention_portable = attend::run;
}
