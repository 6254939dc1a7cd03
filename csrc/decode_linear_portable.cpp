#include "decode_linear_simd.h"

namespace titok {
const DecodeLinearRun decode_linear_portable = decode::run;
}
