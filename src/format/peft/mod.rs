//! HF PEFT's adapter folder: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! Format and defaults are those of PEFT 0.21.2; docs/formats.md shows them.
//! `lora` and `lycoris` know the fields of their configurations.

mod lora;
mod lycoris;

use super::keys::{KeyLayout, PEFT_ENDS, Part};
use crate::error::{Error, Result};
use crate::lora::{AdapterConfig, LayerPattern, LohaConfig, LokrConfig, LoraConfig, TargetModules};
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

/// The version whose format is written.
const PEFT_VERSION: &str = "0.21.2";

/// Fields of every kind of adapter that don't change what it computes: kept as
/// they are.
fn passive() -> Map<String, Value> {
    map(json!({
        "auto_mapping": null, "base_model_name_or_path": null, "inference_mode": false,
        "peft_version": PEFT_VERSION, "revision": null, "task_type": null,
    }))
}

fn map(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

/// The configuration as PEFT writes it: all keys, sorted, two spaces.
pub(crate) fn config_to_json(config: &AdapterConfig) -> Result<Vec<u8>> {
    to_json(config_fields(config))
}

/// JSON as Python's `json.dumps(indent=2, sort_keys=True)` lays it out.
pub(super) fn to_json(fields: Map<String, Value>) -> Result<Vec<u8>> {
    let mut fields = Value::Object(fields);
    fields.sort_all_objects();
    serde_json::to_vec_pretty(&fields).map_err(|error| Error::config("adapter_config", "JSON", error))
}

/// All fields as PEFT has them.
pub(super) fn config_fields(config: &AdapterConfig) -> Map<String, Value> {
    let mut fields = passive();
    match config {
        AdapterConfig::Lora(config) => lora::write(config, &mut fields),
        AdapterConfig::Loha(config) => lycoris::write(config, &mut fields),
        AdapterConfig::Lokr(config) => lycoris::write(config, &mut fields),
    }
    fields.insert("peft_type".into(), config.peft_type().into());
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
    pub(crate) config: AdapterConfig,
    pub(crate) unknown: Vec<String>,
}

impl AdapterConfig {
    /// Reads the `adapter_config.json` of an adapter's folder.
    ///
    /// Fields that this version can't act on are kept;
    /// [`LoraModel`](crate::LoraModel) refuses an adapter that needs them.
    ///
    /// ```
    /// use tch_peft::{AdapterConfig, LoraConfig};
    ///
    /// # let dir = tempfile::tempdir().unwrap();
    /// let config = LoraConfig::builder().r(4).target_modules(["q_proj"]).build()?;
    /// config.save_pretrained(dir.path())?;
    /// let read = AdapterConfig::from_pretrained(dir.path())?;
    /// assert!(read.differences(&config.into()).is_empty());
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Corrupt`] for a field of another type,
    /// [`Error::Config`] for one out of range, [`Error::Unsupported`] for
    /// another kind of adapter.
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

/// The same for a configuration whose kind is known.
macro_rules! files_of {
    ($config:ty, $kind:ident) => {
        impl $config {
            /// As [`AdapterConfig::from_pretrained`], for this kind of adapter.
            ///
            /// # Errors
            /// As there.
            pub fn from_pretrained(folder: impl AsRef<Path>) -> Result<Self> {
                match AdapterConfig::from_pretrained(folder)? {
                    AdapterConfig::$kind(config) => Ok(config),
                    other => Err(other_kind(&other.peft_type().into())),
                }
            }

            /// As [`AdapterConfig::save_pretrained`].
            ///
            /// # Errors
            /// As there.
            pub fn save_pretrained(&self, folder: impl AsRef<Path>) -> Result<()> {
                AdapterConfig::from(self.clone()).save_pretrained(folder)
            }
        }
    };
}

files_of!(LoraConfig, Lora);
files_of!(LohaConfig, Loha);
files_of!(LokrConfig, Lokr);

fn other_kind(found: &Value) -> Error {
    Error::Unsupported { fields: vec![format!("peft_type = {found}")] }
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
    match reader.get("peft_type").and_then(Value::as_str) {
        Some("LORA") => lora::read(&reader),
        Some("LOHA") => lycoris::read_loha(&reader),
        Some("LOKR") => lycoris::read_lokr(&reader),
        _ => Err(other_kind(reader.get("peft_type").unwrap_or(&Value::Null))),
    }
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

    fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.read(key, "true or false")
    }

    /// The fields that none of `typed` is, and the names of those among them
    /// that are not `known` either.
    fn others(&self, typed: &[&str], known: impl Fn(&str) -> bool) -> (Map<String, Value>, Vec<String>) {
        let passive = passive();
        let others = self.fields.iter().filter(|(key, _)| !typed.contains(&key.as_str()) && *key != "peft_type");
        let other: Map<String, Value> = others.map(|(key, value)| (key.clone(), value.clone())).collect();
        let unknown = other.keys().filter(|key| !passive.contains_key(*key) && !known(key)).cloned().collect();
        (other, unknown)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lora::InitLoraWeights;

    fn read(json: Value) -> Result<ReadConfig> {
        config_from_json(Path::new("adapter_config.json"), json.to_string().as_bytes())
    }

    #[test]
    fn what_is_written_is_read_again() {
        let config: AdapterConfig = LoraConfig::builder()
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
            .unwrap()
            .into();
        let bytes = config_to_json(&config).unwrap();
        let again = config_from_json(Path::new("x"), &bytes).unwrap();
        assert_eq!(again.config.differences(&config).len(), 1);
        assert!(again.unknown.is_empty());
        assert_eq!(config_to_json(&again.config).unwrap(), bytes);
        // Patterns are sorted in the file, as PEFT sorts them.
        let again = again.config.as_lora().unwrap();
        assert_eq!(again.rank_pattern.entries().collect::<Vec<_>>(), [("a", 3), ("v", 2)]);
    }

    #[test]
    fn unknown_keys_are_kept_and_told_and_features_refused() {
        let found = read(json!({"peft_type": "LORA", "target_modules": "x", "new_thing": {"a": 1}})).unwrap();
        assert_eq!(found.unknown, ["new_thing"]);
        let text = String::from_utf8(config_to_json(&found.config).unwrap()).unwrap();
        assert!(text.contains("\"new_thing\": {"), "{text}");

        let lacking = json!({
            "peft_type": "LORA", "target_modules": "x", "kasa_config": {"beta": 1}, "layer_replication": [[0, 2]],
        });
        let error = read(lacking).unwrap().config.check_supported().unwrap_err();
        let Error::Unsupported { fields } = error else { panic!("{error}") };
        let named: Vec<&str> = fields.iter().map(|field| field.split(" = ").next().unwrap()).collect();
        assert_eq!(named, ["kasa_config", "layer_replication"]);
        assert!(matches!(read(json!({"peft_type": "VERA"})), Err(Error::Unsupported { .. })));
        assert!(matches!(read(json!({"peft_type": "LORA", "target_modules": 3})), Err(Error::Corrupt { .. })));
        assert!(matches!(read(json!({"peft_type": "LORA", "target_modules": "x", "r": 0})), Err(Error::Config { .. })));
    }
}
