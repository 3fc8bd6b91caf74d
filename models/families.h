// The model families that the decoder runs, a row each: docs/adding-a-model.md.
#pragma once

#include <span>

#include "models/config_keys.h"

namespace vesper {

// A family's name in config.json, what its absent keys stand for (the defaults of its configuration class in
// transformers, models/NAME/configuration_NAME.py), and what it may say that is not supported.
struct Family {
  const char* architecture;  // in "architectures"
  const char* model_type;    // where "architectures" is absent
  int layers;
  int hidden;
  int ffn;
  int heads;
  int kv_heads;  // 0: as many as heads
  int vocab;
  int max_positions;
  double rms_eps;
  double rope_theta;
  int bos_id;
  int eos_id;
  void (*refuse_unsupported)(const ConfigKeys& keys, int max_positions);
};

std::span<const Family> families();

// The family that a config.json names; an unknown one is refused with the list of the known.
const Family& family_of(const ConfigKeys& keys);

}  // namespace vesper
