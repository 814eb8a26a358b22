//! HF PEFT's adapter folder: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! Format and defaults are those of PEFT 0.21.2; docs/formats.md shows them.

use crate::error::{Error, Result};
use crate::lora::{InitLoraWeights, LoraConfig, TargetModules};
use serde_json::{Map, Value, json};
use std::path::Path;

/// Name of the tensors' file.
pub(crate) const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// Name of the configuration's file.
pub(crate) const CONFIG_FILE: &str = "adapter_config.json";

/// The key of an adapter's tensor of the module at `path`, such as
/// `base_model.model.h.0.q_proj.lora_A.weight`.
pub(crate) fn key(path: &str, end: &str) -> String {
    format!("base_model.model.{path}.{end}")
}

/// The module path of a copy of a base weight, which PEFT adds to an adapter
/// that targets `lm_head` or `embed_tokens`.
pub(crate) fn base_copy_path(key: &str) -> Option<&str> {
    key.strip_prefix("base_model.model.")?.strip_suffix(".base_layer.weight")
}

/// Fields that we act on.
const UNDERSTOOD: [&str; 7] =
    ["peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "init_lora_weights"];

/// Fields that don't change what the adapter computes: kept as they are.
fn passive() -> Map<String, Value> {
    map(json!({
        "auto_mapping": null, "base_model_name_or_path": null, "inference_mode": true,
        "loftq_config": {}, "megatron_core": "megatron.core", "peft_version": PEFT_VERSION,
        "qalora_group_size": 16, "revision": null, "task_type": null,
    }))
}

/// Fields that would change it, with the value at which they don't.
fn inert() -> Map<String, Value> {
    map(json!({
        "alora_invocation_tokens": null, "alpha_pattern": {}, "arrow_config": null, "bias": "none",
        "corda_config": null, "ensure_weight_tying": false, "eva_config": null, "exclude_modules": null,
        "fan_in_fan_out": false, "kasa_config": null, "layer_replication": null, "layers_pattern": null,
        "layers_to_transform": null, "lora_bias": false, "lora_ga_config": null, "megatron_config": null,
        "modules_to_save": null, "monteclora_config": null, "rank_pattern": {}, "target_parameters": null,
        "trainable_token_indices": null, "use_bdlora": null, "use_dora": false, "use_qalora": false,
        "velora_config": null,
    }))
}

/// The version whose format is written.
const PEFT_VERSION: &str = "0.21.2";

fn map(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

/// The configuration as PEFT writes it: all keys, sorted, two spaces.
pub(crate) fn config_to_json(config: &LoraConfig) -> Result<Vec<u8>> {
    let mut fields = passive();
    fields.extend(inert());
    fields.extend(config.other.clone());
    fields.extend(map(json!({
        "peft_type": "LORA",
        "r": config.r,
        "lora_alpha": number(config.lora_alpha),
        "lora_dropout": config.lora_dropout,
        "target_modules": match &config.target_modules {
            TargetModules::List(list) => json!(list),
            TargetModules::Regex(pattern) => json!(pattern),
            TargetModules::AllLinear => json!("all-linear"),
        },
        "use_rslora": config.use_rslora,
        "init_lora_weights": match config.init_lora_weights {
            InitLoraWeights::Default => json!(true),
            InitLoraWeights::Random => json!(false),
            InitLoraWeights::Gaussian => json!("gaussian"),
        },
    })));
    fields.sort_keys();
    serde_json::to_vec_pretty(&fields).map_err(|error| Error::config("adapter_config", "JSON", error))
}

/// PEFT's alpha is an integer where it can be.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 1e15 { json!(value as i64) } else { json!(value) }
}

/// A configuration and the keys in it that we don't know.
#[derive(Debug)]
pub(crate) struct ReadConfig {
    pub(crate) config: LoraConfig,
    pub(crate) unknown: Vec<String>,
}

/// Reads `adapter_config.json`. Keys that we don't know are kept and reported;
/// features that we don't have are refused by name.
pub(crate) fn read_config(folder: &Path) -> Result<ReadConfig> {
    let path = folder.join(CONFIG_FILE);
    let bytes = std::fs::read(&path).map_err(Error::io(&path))?;
    config_from_json(&path, &bytes)
}

pub(crate) fn config_from_json(path: &Path, bytes: &[u8]) -> Result<ReadConfig> {
    let fields: Map<String, Value> =
        serde_json::from_slice(bytes).map_err(|error| Error::corrupt(path, format!("not a JSON object ({error})")))?;
    let reader = Reader { path, fields: &fields };
    let (passive, inert) = (passive(), inert());
    let (mut other, mut unknown, mut unsupported) = (Map::new(), Vec::new(), Vec::new());
    if reader.get("peft_type") != Some(&json!("LORA")) {
        unsupported.push(format!("peft_type = {}", reader.get("peft_type").unwrap_or(&Value::Null)));
    }
    for (key, value) in &fields {
        if UNDERSTOOD.contains(&key.as_str()) {
            continue;
        } else if let Some(default) = inert.get(key) {
            if !means_nothing(value) && value != default {
                unsupported.push(format!("{key} = {value}"));
            }
        } else {
            if !passive.contains_key(key) {
                unknown.push(key.clone());
            }
            other.insert(key.clone(), value.clone());
        }
    }
    let init_lora_weights = match reader.get("init_lora_weights") {
        None | Some(Value::Bool(true)) => InitLoraWeights::Default,
        Some(Value::Bool(false)) => InitLoraWeights::Random,
        Some(Value::String(name)) if name == "gaussian" => InitLoraWeights::Gaussian,
        Some(value) => {
            unsupported.push(format!("init_lora_weights = {value}"));
            InitLoraWeights::Default
        }
    };
    unsupported.sort();
    if !unsupported.is_empty() {
        return Err(Error::Unsupported { fields: unsupported });
    }
    let config = LoraConfig {
        r: reader.typed("r", "an integer", Value::as_i64)?.unwrap_or(8),
        lora_alpha: reader.typed("lora_alpha", "a number", Value::as_f64)?.unwrap_or(8.0),
        lora_dropout: reader.typed("lora_dropout", "a number", Value::as_f64)?.unwrap_or(0.0),
        target_modules: reader.target_modules()?,
        use_rslora: reader.typed("use_rslora", "true or false", Value::as_bool)?.unwrap_or(false),
        init_lora_weights,
        other,
    };
    Ok(ReadConfig { config: config.validate()?, unknown })
}

/// `null`, `false` and empty containers ask for nothing.
fn means_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}

struct Reader<'a> {
    path: &'a Path,
    fields: &'a Map<String, Value>,
}

impl<'a> Reader<'a> {
    /// A field that is there and not null.
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.fields.get(key).filter(|value| !value.is_null())
    }

    fn typed<T>(&self, key: &str, expected: &str, cast: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match cast(value) {
            Some(value) => Ok(Some(value)),
            None => Err(Error::corrupt(self.path, format!("`{key}` is {value}; expected {expected}"))),
        }
    }

    fn target_modules(&self) -> Result<TargetModules> {
        let wrong = |found: &dyn std::fmt::Display| {
            Error::corrupt(self.path, format!("`target_modules` is {found}; expected names or a pattern"))
        };
        match self.get("target_modules") {
            Some(Value::String(pattern)) => Ok(pattern.as_str().into()),
            Some(Value::Array(list)) => {
                let names: Option<Vec<&str>> = list.iter().map(Value::as_str).collect();
                Ok(names.ok_or_else(|| wrong(&Value::from(list.clone())))?.into())
            }
            other => Err(wrong(&other.unwrap_or(&Value::Null))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: Value) -> Result<ReadConfig> {
        config_from_json(Path::new("adapter_config.json"), json.to_string().as_bytes())
    }

    #[test]
    fn what_is_written_is_read_again() {
        let config = LoraConfig::builder()
            .r(4)
            .lora_alpha(8.5)
            .lora_dropout(0.05)
            .target_modules(["a", "b"])
            .use_rslora(true)
            .init_lora_weights(InitLoraWeights::Gaussian)
            .build()
            .unwrap();
        let bytes = config_to_json(&config).unwrap();
        let again = config_from_json(Path::new("x"), &bytes).unwrap();
        assert!(config.differences(&again.config).is_empty());
        assert!(again.unknown.is_empty());
        assert_eq!(config_to_json(&again.config).unwrap(), bytes);
    }

    #[test]
    fn unknown_keys_are_kept_and_told_and_features_refused() {
        let found = read(json!({"peft_type": "LORA", "target_modules": "x", "new_thing": {"a": 1}})).unwrap();
        assert_eq!(found.unknown, ["new_thing"]);
        let text = String::from_utf8(config_to_json(&found.config).unwrap()).unwrap();
        assert!(text.contains("\"new_thing\": {"), "{text}");

        let error =
            read(json!({"peft_type": "LORA", "target_modules": "x", "use_dora": true, "bias": "all"})).unwrap_err();
        let Error::Unsupported { fields } = error else { panic!("{error}") };
        assert_eq!(fields, ["bias = \"all\"", "use_dora = true"]);
        assert!(matches!(read(json!({"peft_type": "LOHA"})), Err(Error::Unsupported { .. })));
        assert!(matches!(read(json!({"peft_type": "LORA", "target_modules": 3})), Err(Error::Corrupt { .. })));
        assert!(matches!(read(json!({"peft_type": "LORA", "target_modules": "x", "r": 0})), Err(Error::Config { .. })));
    }
}
