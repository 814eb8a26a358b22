//! Which features this version lacks, so that an adapter that needs one is refused by name.

use super::{InitLoraWeights, LoraConfig};
use crate::error::{Error, Result};
use serde_json::{Value, json};

/// Fields that are kept in the form that files have. Those of variants that we
/// don't have are refused unless they mean nothing. Each with whether PEFT's default is
/// `false`; else it is `null`.
pub(crate) const FOREIGN: [(&str, bool); 11] = [
    ("alora_invocation_tokens", false),
    ("arrow_config", false),
    ("corda_config", false),
    ("eva_config", false),
    ("kasa_config", false),
    ("lora_ga_config", false),
    ("megatron_config", false),
    ("monteclora_config", false),
    ("use_bdlora", false),
    ("use_qalora", true),
    ("velora_config", false),
];

/// Those of them that we act on, through accessors of `LoraConfig`.
const KNOWN: [&str; 4] = ["corda_config", "eva_config", "lora_ga_config", "use_qalora"];

/// `null`, `false` and empty containers ask for nothing.
pub(crate) fn means_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}

impl LoraConfig {
    /// Refuses a configuration that needs a feature that this version lacks.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with every such field.
    pub(crate) fn check_supported(&self) -> Result<()> {
        let mut fields = Vec::new();
        let mut lacks = |field: &str, value: Value| {
            if !means_nothing(&value) {
                fields.push(format!("{field} = {value}"));
            }
        };
        for (key, _) in FOREIGN.into_iter().filter(|(key, _)| !KNOWN.contains(key)) {
            lacks(key, self.other.get(key).cloned().unwrap_or(Value::Null));
        }
        let init = self.init_lora_weights;
        // It needs a factor that stays frozen.
        if init == InitLoraWeights::Mica {
            lacks("init_lora_weights", json!(init.name()));
        }
        // Weights carry the adapters, and a layer that runs twice has them once.
        if self.layer_replication.is_some() {
            let ranges = json!(self.layer_replication);
            let way = "the model's code decides how often a layer runs: build the deeper model";
            fields.push(format!("layer_replication = {ranges} ({way})"));
        }
        fields.sort();
        if fields.is_empty() { Ok(()) } else { Err(Error::Unsupported { fields }) }
    }
}
