#include "maskgit_step_simd.h"

namespace titok {
const MaskgitStepRun maskgit_step_avx2 = run;
}
