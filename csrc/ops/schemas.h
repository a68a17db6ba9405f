// What the ops take and give, in one file for C++ and Python, which defines them where this library is not.
#pragma once

namespace onepass {

constexpr const char* kSchemas[] = {
#include "../../python/onepass/schemas.inc"
};

}  // namespace onepass
