#include "decode_linear_simd.h"

namespace titok {
const DecodeLinearRun decode_linear_avx2 = decode::run;
}
