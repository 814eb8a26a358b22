//! HF PEFT's adapter folder: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! Format and defaults are those of PEFT 0.21.2; docs/formats.md shows them.

use super::keys::{KeyLayout, PEFT_ENDS, Part};
use crate::error::{Error, Result};
use crate::lora::{FOREIGN, InitLoraWeights, LayerPattern, LoraConfig, TargetModules};
use serde::de::DeserializeOwned;
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

/// Keys of modules that are called otherwise in the file.
pub(super) struct Keys;

impl KeyLayout for Keys {
    fn component<'k>(&self, key: &'k str) -> Option<(&'k str, &'k str)> {
        key.strip_prefix("base_model.model.").map(|rest| ("", rest))
    }

    fn prefix(&self, _component: &str) -> String {
        "base_model.model.".into()
    }

    fn names(&self, _component: &str, path: &str) -> Vec<String> {
        vec![path.to_string()]
    }

    fn ends(&self) -> &'static [(&'static str, Part)] {
        &PEFT_ENDS
    }
}

/// Fields that have a place of their own in `LoraConfig`.
const TYPED: [&str; 21] = [
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
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "target_parameters",
    "trainable_token_indices",
    "use_dora",
    "use_rslora",
];

/// Fields that don't change what the adapter computes: kept as they are.
fn passive() -> Map<String, Value> {
    map(json!({
        "auto_mapping": null, "base_model_name_or_path": null, "inference_mode": false,
        "loftq_config": {}, "megatron_core": "megatron.core", "peft_version": PEFT_VERSION,
        "qalora_group_size": 16, "revision": null, "task_type": null,
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
    to_json(config_fields(config))
}

/// JSON as Python's `json.dumps(indent=2, sort_keys=True)` lays it out.
pub(super) fn to_json(fields: Map<String, Value>) -> Result<Vec<u8>> {
    let mut fields = Value::Object(fields);
    fields.sort_all_objects();
    serde_json::to_vec_pretty(&fields).map_err(|error| Error::config("adapter_config", "JSON", error))
}

/// All fields as PEFT has them.
pub(super) fn config_fields(config: &LoraConfig) -> Map<String, Value> {
    let mut fields = passive();
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
        "peft_type": "LORA",
        "r": config.r,
        "rank_pattern": pattern(&config.rank_pattern, Value::from),
        "target_modules": modules(&config.target_modules),
        "target_parameters": config.target_parameters,
        "trainable_token_indices": config.trainable_token_indices,
        "use_dora": config.use_dora,
        "use_rslora": config.use_rslora,
    })));
    fields
}

fn modules(modules: &Option<TargetModules>) -> Value {
    match modules {
        None => Value::Null,
        Some(TargetModules::List(list)) => json!(list),
        Some(TargetModules::Regex(pattern)) => json!(pattern),
        Some(TargetModules::AllLinear) => json!("all-linear"),
    }
}

fn pattern<T: Copy + PartialEq>(pattern: &LayerPattern<T>, value: impl Fn(T) -> Value) -> Value {
    Value::Object(pattern.entries().map(|(pattern, v)| (pattern.to_string(), value(v))).collect())
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

impl LoraConfig {
    /// Reads the `adapter_config.json` of an adapter's folder.
    ///
    /// Fields that this version can't act on are kept;
    /// [`LoraModel`](crate::LoraModel) refuses an adapter that needs them.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Corrupt`] for a field of another type,
    /// [`Error::Config`] for one out of range, [`Error::Unsupported`] for
    /// another kind of adapter than LoRA.
    pub fn from_pretrained(folder: impl AsRef<Path>) -> Result<Self> {
        Ok(read_config(folder.as_ref())?.config)
    }

    /// Writes `adapter_config.json` into the folder, which is made.
    ///
    /// PEFT applies the patterns of `rank_pattern` and `alpha_pattern` in
    /// sorted order; see [`LayerPattern`].
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn save_pretrained(&self, folder: impl AsRef<Path>) -> Result<()> {
        super::write_files(folder.as_ref(), &[(CONFIG_FILE.into(), config_to_json(self)?)])
    }
}

/// Reads `adapter_config.json`. Keys that we don't know are kept and reported.
pub(crate) fn read_config(folder: &Path) -> Result<ReadConfig> {
    let path = folder.join(CONFIG_FILE);
    let bytes = std::fs::read(&path).map_err(Error::io(&path))?;
    config_from_json(&path, &bytes)
}

pub(crate) fn config_from_json(path: &Path, bytes: &[u8]) -> Result<ReadConfig> {
    let fields: Map<String, Value> =
        serde_json::from_slice(bytes).map_err(|error| Error::corrupt(path, format!("not a JSON object ({error})")))?;
    config_from_fields(path, &fields)
}

pub(super) fn config_from_fields(path: &Path, fields: &Map<String, Value>) -> Result<ReadConfig> {
    let reader = Reader { path, fields };
    if reader.get("peft_type") != Some(&json!("LORA")) {
        let found = reader.get("peft_type").unwrap_or(&Value::Null);
        return Err(Error::Unsupported { fields: vec![format!("peft_type = {found}")] });
    }
    let passive = passive();
    let (mut other, mut unknown) = (Map::new(), Vec::new());
    for (key, value) in fields.iter().filter(|(key, _)| !TYPED.contains(&key.as_str())) {
        if !passive.contains_key(key) && !FOREIGN.iter().any(|(foreign, _)| foreign == key) {
            unknown.push(key.clone());
        }
        other.insert(key.clone(), value.clone());
    }
    let flag = |key| Ok::<_, Error>(reader.read(key, "true or false")?.unwrap_or(false));
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
        init_lora_weights: reader.init()?,
        trainable_token_indices: reader.read("trainable_token_indices", "rows, or rows by modules")?,
        target_parameters: reader.read("target_parameters", NAMES)?,
        ensure_weight_tying: flag("ensure_weight_tying")?,
        layer_replication: reader.read("layer_replication", "a list of [start, end]")?,
        dtype: None,
        other,
    };
    Ok(ReadConfig { config: config.validate()?, unknown })
}

const NAMES: &str = "a list of names";

struct Reader<'a> {
    path: &'a Path,
    fields: &'a Map<String, Value>,
}

impl<'a> Reader<'a> {
    /// A field that is there and not null.
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.fields.get(key).filter(|value| !value.is_null())
    }

    fn wrong(&self, key: &str, value: &Value, expected: &str) -> Error {
        Error::corrupt(self.path, format!("`{key}` is {value}; expected {expected}"))
    }

    fn read<T: DeserializeOwned>(&self, key: &str, expected: &str) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        T::deserialize(value).map(Some).map_err(|_| self.wrong(key, value, expected))
    }

    fn modules(&self, key: &str) -> Result<Option<TargetModules>> {
        if let Some(Value::String(pattern)) = self.get(key) {
            return Ok(Some(pattern.as_str().into()));
        }
        Ok(self.read::<Vec<String>>(key, "names or a pattern")?.map(TargetModules::List))
    }

    /// Values by patterns, in the order of the file.
    fn pattern<T: DeserializeOwned + Copy + PartialEq>(&self, key: &str, expected: &str) -> Result<LayerPattern<T>> {
        let Some(value) = self.get(key) else { return Ok(LayerPattern::default()) };
        let entries = value.as_object().and_then(|object| {
            let entry = |(pattern, value): (&String, &Value)| Some((pattern.clone(), T::deserialize(value).ok()?));
            object.iter().map(entry).collect::<Option<Vec<_>>>()
        });
        entries.map(LayerPattern::new).ok_or_else(|| self.wrong(key, value, expected))
    }

    fn init(&self) -> Result<InitLoraWeights> {
        match self.get("init_lora_weights") {
            None => Ok(InitLoraWeights::Default),
            Some(Value::Bool(on)) => Ok((*on).into()),
            Some(value) => {
                let known = value.as_str().and_then(InitLoraWeights::from_name);
                known.ok_or_else(|| Error::Unsupported { fields: vec![format!("init_lora_weights = {value}")] })
            }
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
            .rank_pattern([("v", 2), ("a", 3)])
            .layers_to_transform(1)
            .trainable_token_indices([("wte", [3, 5])])
            .build()
            .unwrap();
        let bytes = config_to_json(&config).unwrap();
        let again = config_from_json(Path::new("x"), &bytes).unwrap();
        assert_eq!(again.config.differences(&config).len(), 1);
        assert!(again.unknown.is_empty());
        assert_eq!(config_to_json(&again.config).unwrap(), bytes);
        // Patterns are sorted in the file, as PEFT sorts them.
        assert_eq!(again.config.rank_pattern.entries().collect::<Vec<_>>(), [("a", 3), ("v", 2)]);
    }

    #[test]
    fn unknown_keys_are_kept_and_told_and_features_refused() {
        let found = read(json!({"peft_type": "LORA", "target_modules": "x", "new_thing": {"a": 1}})).unwrap();
        assert_eq!(found.unknown, ["new_thing"]);
        let text = String::from_utf8(config_to_json(&found.config).unwrap()).unwrap();
        assert!(text.contains("\"new_thing\": {"), "{text}");

        let lacking =
            json!({"peft_type": "LORA", "target_modules": "x", "use_qalora": true, "layer_replication": [[0, 2]]});
        let error = read(lacking).unwrap().config.check_supported().unwrap_err();
        let Error::Unsupported { fields } = error else { panic!("{error}") };
        let named: Vec<&str> = fields.iter().map(|field| field.split(" = [").next().unwrap()).collect();
        assert_eq!(named, ["layer_replication", "use_qalora = true"]);
        assert!(matches!(read(json!({"peft_type": "LOHA"})), Err(Error::Unsupported { .. })));
        assert!(matches!(read(json!({"peft_type": "LORA", "target_modules": 3})), Err(Error::Corrupt { .. })));
        assert!(matches!(read(json!({"peft_type": "LORA", "target_modules": "x", "r": 0})), Err(Error::Config { .. })));
    }
}
