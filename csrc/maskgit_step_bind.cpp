#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "bind.h"
#include "maskgit_step.h"

namespace py = pybind11;

namespace {

using titok::Pair;
using titok::pointer;
using titok::value;

titok::Confidence parse_confidence(const std::string& name) {
  if (name == "logit") return titok::Confidence::logit;
  if (name == "log_probability") return titok::Confidence::log_probability;
  throw std::invalid_argument("confidence: '" + name + "' is not logit or log_probability");
}

void define(py::module_& m, const char* name, void (*run)(const titok::MaskgitStepArgs&)) {
  m.def(
      name,
      [run](std::uintptr_t cond, std::uintptr_t uncond, std::pair<int64_t, int64_t> cond_strides,
            std::pair<int64_t, int64_t> uncond_strides, int64_t batch, int64_t length,
            int64_t vocabulary, const std::string& dtype, bool from_uncond, const std::string& kind,
            std::uintptr_t ids, int64_t mask_id, std::uintptr_t image_ids, std::uintptr_t positions,
            std::uintptr_t token_noise, std::uintptr_t confidence_noise,
            const Pair<int64_t>& num_masked, int64_t num_masked_stride, const Pair<int64_t>& seed,
            const Pair<int64_t>& step, const Pair<float>& guidance_scale,
            const Pair<float>& softmax_temperature, const Pair<float>& token_temperature,
            const Pair<float>& confidence_temperature, std::uintptr_t ids_next,
            std::uintptr_t tokens, std::uintptr_t confidence, std::uintptr_t workspace, int threads,
            std::uintptr_t stream) {
        titok::MaskgitStepArgs args{};
        args.cond = pointer<const void>(cond);
        args.uncond = pointer<const void>(uncond);
        args.cond_strides[0] = cond_strides.first;
        args.cond_strides[1] = cond_strides.second;
        args.uncond_strides[0] = uncond_strides.first;
        args.uncond_strides[1] = uncond_strides.second;
        args.batch = batch;
        args.length = length;
        args.vocabulary = vocabulary;
        args.dtype = titok::parse_dtype(dtype);
        args.from_uncond = from_uncond;
        args.kind = parse_confidence(kind);
        args.ids = pointer<const int64_t>(ids);
        args.mask_id = mask_id;
        args.image_ids = pointer<const int64_t>(image_ids);
        args.positions = pointer<const int64_t>(positions);
        args.token_noise = pointer<const float>(token_noise);
        args.confidence_noise = pointer<const float>(confidence_noise);
        args.num_masked = value(num_masked);
        args.num_masked_stride = num_masked_stride;
        args.seed = value(seed);
        args.step = value(step);
        args.guidance_scale = value(guidance_scale);
        args.softmax_temperature = value(softmax_temperature);
        args.token_temperature = value(token_temperature);
        args.confidence_temperature = value(confidence_temperature);
        args.ids_next = pointer<int64_t>(ids_next);
        args.tokens = pointer<int64_t>(tokens);
        args.confidence = pointer<float>(confidence);
        args.workspace = pointer<void>(workspace);
        args.threads = threads;
        args.stream = pointer<void>(stream);
        py::gil_scoped_release release;
        run(args);
      },
      py::arg("cond"), py::arg("uncond"), py::arg("cond_strides"), py::arg("uncond_strides"),
      py::arg("batch"), py::arg("length"), py::arg("vocabulary"), py::arg("dtype"),
      py::arg("from_uncond"), py::arg("kind"), py::arg("ids"), py::arg("mask_id"),
      py::arg("image_ids"), py::arg("positions"), py::arg("token_noise"),
      py::arg("confidence_noise"), py::arg("num_masked"), py::arg("num_masked_stride"),
      py::arg("seed"), py::arg("step"), py::arg("guidance_scale"), py::arg("softmax_temperature"),
      py::arg("token_temperature"), py::arg("confidence_temperature"), py::arg("ids_next"),
      py::arg("tokens"), py::arg("confidence"), py::arg("workspace"), py::arg("threads"),
      py::arg("stream"));
}

}  // namespace

void bind_maskgit_step(py::module_& m) {
  m.def("philox4x32", [](const std::array<uint32_t, 4>& c, uint32_t low_key, uint32_t high_key) {
    const auto words = titok::draw::philox4x32({{c[0], c[1], c[2], c[3]}}, low_key, high_key);
    return std::array<uint32_t, 4>{words.w[0], words.w[1], words.w[2], words.w[3]};
  });
  m.def("maskgit_step_cpu_workspace", &titok::maskgit_step_cpu_workspace, py::arg("length"),
        py::arg("vocabulary"), py::arg("threads"));
  define(m, "maskgit_step_cpu", titok::maskgit_step_cpu);
#ifdef TITOK_FAST_CUDA
  define(m, "maskgit_step_cuda", titok::maskgit_step_cuda);
#endif
}
