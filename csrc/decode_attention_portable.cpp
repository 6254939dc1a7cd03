#include "decode_attention_simd.h"

namespace titok {
const DecodeAttentionRun decode_attention_portable = decode::run;
}
