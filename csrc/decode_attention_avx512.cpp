#include "decode_attention_simd.h"

namespace titok {
const DecodeAttentionRun decode_attention_avx512 = decode::run;
}
