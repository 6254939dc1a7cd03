#include "decode_attention_simd.h"

namespace titok {
const DecodeAttentionRun decode_attention_avx2 = decode::run;
}
