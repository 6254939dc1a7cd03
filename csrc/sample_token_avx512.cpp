#include "sample_token_simd.h"

namespace titok {
const SampleTokenRun sample_token_avx512 = run;
}
