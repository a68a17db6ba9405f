// A process without Python: loads onepass's library, then a package of AOTInductor (.pt2) or a trace, and runs it.
//
//   server LIBRARY PROGRAM INPUTS EXPECTED [NEXT FIRST]     INPUTS, EXPECTED and FIRST: tuples of tensors, saved by torch.save
//
// With another program, NEXT, that takes FIRST and then the tensors that the other returned, and what is expected is of it.
// Exit status 0: what came out is what was expected, to the last bit. 1: it is not. Anything else: it did not run.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/import.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <cstdio>
#include <exception>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

namespace {

std::vector<at::Tensor> tensors_of(const c10::IValue& tuple) {
  std::vector<at::Tensor> found;
  for (const c10::IValue& element : tuple.toTupleRef().elements()) found.push_back(element.toTensor());
  return found;
}

std::vector<at::Tensor> saved(const char* path) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), {});
  return tensors_of(torch::jit::pickle_load(bytes));
}

std::vector<at::Tensor> run(const std::string& program, const std::vector<at::Tensor>& inputs) {
  if (program.ends_with(".pt2")) return torch::inductor::AOTIModelPackageLoader(program).run(inputs);
  return tensors_of(torch::jit::load(program).forward({inputs.begin(), inputs.end()}));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5 && argc != 7) return 2;
  if (dlopen(argv[1], RTLD_NOW) == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 3;
  }
  try {
    const std::vector<at::Tensor> expected = saved(argv[4]);
    std::vector<at::Tensor> outputs = run(argv[2], saved(argv[3]));
    if (argc == 7) {
      std::vector<at::Tensor> inputs = saved(argv[6]);
      inputs.insert(inputs.end(), outputs.begin(), outputs.end());
      outputs = run(argv[5], inputs);
    }
    if (outputs.size() != expected.size()) return 1;
    for (size_t i = 0; i < outputs.size(); ++i)
      if (!outputs[i].equal(expected[i])) return 1;
  } catch (const std::exception& problem) {
    std::fprintf(stderr, "%s\n", problem.what());
    return 4;
  }
  return 0;
}
