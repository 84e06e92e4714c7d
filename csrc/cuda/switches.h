// Switches in the environment.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace l2l {

// 1: on; 0, empty or unset: off. Throws std::invalid_argument, which names the variable, for anything else.
inline bool environment_switch(const char* name) {
  const char* text = std::getenv(name);
  const std::string value = text ? text : "";
  if (!value.empty() && value != "0" && value != "1")
    throw std::invalid_argument(std::string(name) + ": expected 0 or 1, got '" + value + "'");
  return value == "1";
}

}  // namespace l2l
