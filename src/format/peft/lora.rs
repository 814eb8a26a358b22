//! The fields of `LoraConfig`.

use super::{NAMES, ReadConfig, Reader, map, modules, number, pattern};
use crate::error::{Error, Result};
use crate::lora::{FOREIGN, InitLoraWeights, LoraConfig};
use serde_json::{Map, Value, json};

/// Fields that have a place of their own in `LoraConfig`.
const TYPED: [&str; 20] = [
    "alpha_pattern",
    "bias",
    "ensure_weight_tying",
    "exclude_modules",
    "fan_in_fan_out",
    "init_lora_weights",
    "layer_replication",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "modules_to_save",
    "r",
    "rank_pattern",
    "target_modules",
    "target_parameters",
    "trainable_token_indices",
    "use_dora",
    "use_rslora",
];

/// Fields beside those that every kind has that change nothing by themselves.
fn passive() -> Map<String, Value> {
    map(json!({"loftq_config": {}, "megatron_core": "megatron.core", "qalora_group_size": 16}))
}

/// All fields, over those that every kind has.
pub(super) fn write(config: &LoraConfig, fields: &mut Map<String, Value>) {
    fields.extend(passive());
    fields.extend(FOREIGN.map(|(key, is_flag)| (key.to_string(), if is_flag { json!(false) } else { Value::Null })));
    fields.extend(config.other.clone());
    fields.extend(map(json!({
        "alpha_pattern": pattern(&config.alpha_pattern, number),
        "bias": config.bias,
        "ensure_weight_tying": config.ensure_weight_tying,
        "exclude_modules": modules(&config.exclude_modules),
        "fan_in_fan_out": config.fan_in_fan_out,
        "init_lora_weights": match config.init_lora_weights {
            InitLoraWeights::Default => json!(true),
            InitLoraWeights::Random => json!(false),
            named => json!(named.name()),
        },
        "layer_replication": config.layer_replication,
        "layers_pattern": config.layers_pattern,
        "layers_to_transform": config.layers_to_transform,
        "lora_alpha": number(config.lora_alpha),
        "lora_bias": config.lora_bias,
        "lora_dropout": config.lora_dropout,
        "modules_to_save": config.modules_to_save,
        "r": config.r,
        "rank_pattern": pattern(&config.rank_pattern, Value::from),
        "target_modules": modules(&config.target_modules),
        "target_parameters": config.target_parameters,
        "trainable_token_indices": config.trainable_token_indices,
        "use_dora": config.use_dora,
        "use_rslora": config.use_rslora,
    })));
}

pub(super) fn read(reader: &Reader) -> Result<ReadConfig> {
    let passive = passive();
    let foreign = |key: &str| FOREIGN.iter().any(|(foreign, _)| *foreign == key);
    let (other, unknown) = reader.others(&TYPED, |key| passive.contains_key(key) || foreign(key));
    let flag = |key| Ok::<_, Error>(reader.flag(key)?.unwrap_or(false));
    let default = LoraConfig::default();
    let config = LoraConfig {
        r: reader.read("r", "an integer")?.unwrap_or(default.r),
        lora_alpha: reader.read("lora_alpha", "a number")?.unwrap_or(default.lora_alpha),
        lora_dropout: reader.read("lora_dropout", "a number")?.unwrap_or(default.lora_dropout),
        target_modules: reader.modules("target_modules")?,
        exclude_modules: reader.modules("exclude_modules")?,
        layers_to_transform: reader.read("layers_to_transform", "an integer or a list of integers")?,
        layers_pattern: reader.read("layers_pattern", "a name or a list of names")?,
        rank_pattern: reader.pattern("rank_pattern", "integers by patterns")?,
        alpha_pattern: reader.pattern("alpha_pattern", "numbers by patterns")?,
        modules_to_save: reader.read("modules_to_save", NAMES)?,
        bias: reader.read("bias", "\"none\", \"all\" or \"lora_only\"")?.unwrap_or_default(),
        lora_bias: flag("lora_bias")?,
        fan_in_fan_out: flag("fan_in_fan_out")?,
        use_rslora: flag("use_rslora")?,
        use_dora: flag("use_dora")?,
        init_lora_weights: init(reader)?,
        trainable_token_indices: reader.read("trainable_token_indices", "rows, or rows by modules")?,
        target_parameters: reader.read("target_parameters", NAMES)?,
        ensure_weight_tying: flag("ensure_weight_tying")?,
        layer_replication: reader.read("layer_replication", "a list of [start, end]")?,
        dtype: None,
        other,
    };
    Ok(ReadConfig { config: config.validate()?.into(), unknown })
}

fn init(reader: &Reader) -> Result<InitLoraWeights> {
    match reader.get("init_lora_weights") {
        None => Ok(InitLoraWeights::Default),
        Some(Value::Bool(on)) => Ok((*on).into()),
        Some(value) => {
            let known = value.as_str().and_then(InitLoraWeights::from_name);
            known.ok_or_else(|| Error::Unsupported { fields: vec![format!("init_lora_weights = {value}")] })
        }
    }
}
