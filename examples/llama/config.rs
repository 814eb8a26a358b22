//! `config.json` of a Hugging Face folder.

use super::Result;
use serde::Deserialize;
use std::path::Path;
use tch::Kind;

/// The architectures, by `model_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
}

/// The fields that matter here; names and defaults are those of `transformers`.
#[derive(Debug, Clone, Deserialize)]
pub struct Config {
    pub model_type: Family,
    pub vocab_size: i64,
    pub hidden_size: i64,
    pub intermediate_size: i64,
    pub num_hidden_layers: usize,
    pub num_attention_heads: i64,
    num_key_value_heads: Option<i64>,
    head_dim: Option<i64>,
    #[serde(default = "silu")]
    hidden_act: String,
    #[serde(default = "eps")]
    pub rms_norm_eps: f64,
    #[serde(default)]
    pub tie_word_embeddings: bool,
    #[serde(default)]
    pub attention_bias: bool,
    #[serde(default)]
    pub mlp_bias: bool,
    #[serde(default)]
    attention_dropout: f64,
    sliding_window: Option<i64>,
    #[serde(default)]
    use_sliding_window: bool,
    max_window_layers: Option<usize>,
    layer_types: Option<Vec<String>>,
    max_position_embeddings: Option<f32>,
    rope_theta: Option<f64>,
    /// Before version 5 of `transformers`.
    rope_scaling: Option<RopeFields>,
    /// Since then.
    rope_parameters: Option<RopeFields>,
    #[serde(alias = "torch_dtype")]
    dtype: Option<String>,
    eos_token_id: Option<OneOrMany>,
}

#[derive(Debug, Clone, Default, Deserialize)]
struct RopeFields {
    rope_type: Option<String>,
    #[serde(rename = "type")]
    old_type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f32>,
    low_freq_factor: Option<f32>,
    high_freq_factor: Option<f32>,
    original_max_position_embeddings: Option<f32>,
    partial_rotary_factor: Option<f64>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(i64),
    Many(Vec<i64>),
}

/// How positions turn the features.
#[derive(Debug, Clone, Copy)]
pub struct Rope {
    pub theta: f64,
    pub kind: RopeType,
}

#[derive(Debug, Clone, Copy)]
pub enum RopeType {
    Default,
    Linear { factor: f32 },
    Llama3 { factor: f32, low: f32, high: f32, original: f32 },
}

impl Config {
    /// Reads and checks `config.json`; what is not implemented is refused by name.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("config.json");
        let at = |error: String| format!("{}: {error}", path.display());
        let text = std::fs::read_to_string(&path).map_err(|error| at(error.to_string()))?;
        let config: Config = serde_json::from_str(&text).map_err(|error| at(error.to_string()))?;
        config.check().map_err(at)?;
        Ok(config)
    }

    fn check(&self) -> Result<(), String> {
        let refuse = |field: &str, value: &dyn std::fmt::Display| Err(format!("{field} = {value} is not implemented"));
        if self.hidden_act != "silu" {
            return refuse("hidden_act", &self.hidden_act);
        }
        if self.attention_dropout != 0.0 {
            return refuse("attention_dropout", &self.attention_dropout);
        }
        if let Some(part) = self.rope_fields().partial_rotary_factor.filter(|part| *part != 1.0) {
            return refuse("partial_rotary_factor", &part);
        }
        let known = ["full_attention", "sliding_attention"];
        let types = self.layer_types.iter().flatten();
        if let Some(other) = types.clone().find(|kind| !known.contains(&kind.as_str())) {
            return refuse("layer_types", other);
        }
        if self.layer_types.is_some() && types.count() != self.num_hidden_layers {
            return Err("layer_types: expected one for each of num_hidden_layers".into());
        }
        if self.num_attention_heads % self.key_value_heads() != 0 {
            return Err("num_attention_heads: expected a multiple of num_key_value_heads".into());
        }
        self.rope_type().map(drop)
    }

    /// Heads of keys and values, each shared by a group of query heads.
    pub fn key_value_heads(&self) -> i64 {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }

    pub fn head_dim(&self) -> i64 {
        let default = match self.model_type {
            Family::Qwen3 => 128,
            _ => self.hidden_size / self.num_attention_heads,
        };
        self.head_dim.unwrap_or(default)
    }

    /// How many positions a query of this layer sees, if not all before it.
    pub fn window(&self, layer: usize) -> Option<i64> {
        let slides = match (self.model_type, &self.layer_types) {
            (Family::Llama, _) => false,
            (Family::Mistral, _) => true,
            (_, Some(types)) => self.use_sliding_window && types[layer] == "sliding_attention",
            (_, None) => self.use_sliding_window && layer >= self.max_window_layers.unwrap_or(28),
        };
        self.sliding_window.filter(|_| slides)
    }

    pub fn rope(&self) -> Rope {
        let theta = self.rope_fields().rope_theta.or(self.rope_theta).unwrap_or(10_000.0);
        Rope { theta, kind: self.rope_type().unwrap_or(RopeType::Default) }
    }

    fn rope_fields(&self) -> RopeFields {
        self.rope_parameters.clone().or_else(|| self.rope_scaling.clone()).unwrap_or_default()
    }

    fn rope_type(&self) -> Result<RopeType, String> {
        let fields = self.rope_fields();
        let need = |name: &str, value: Option<f32>| value.ok_or_else(|| format!("rope_scaling: {name} is missing"));
        match fields.rope_type.as_deref().or(fields.old_type.as_deref()).unwrap_or("default") {
            "default" => Ok(RopeType::Default),
            "linear" => Ok(RopeType::Linear { factor: need("factor", fields.factor)? }),
            "llama3" => Ok(RopeType::Llama3 {
                factor: need("factor", fields.factor)?,
                low: need("low_freq_factor", fields.low_freq_factor)?,
                high: need("high_freq_factor", fields.high_freq_factor)?,
                original: need(
                    "original_max_position_embeddings",
                    fields.original_max_position_embeddings.or(self.max_position_embeddings),
                )?,
            }),
            other => Err(format!("rope_type = {other} is not implemented")),
        }
    }

    /// The dtype that the weights are kept in on disk.
    pub fn kind(&self) -> Kind {
        match self.dtype.as_deref() {
            Some("bfloat16") => Kind::BFloat16,
            Some("float16") => Kind::Half,
            _ => Kind::Float,
        }
    }

    /// The token that ends a text, the first if there are several.
    pub fn eos(&self) -> Option<i64> {
        self.ends().first().copied()
    }

    /// All tokens that end a text.
    pub fn ends(&self) -> &[i64] {
        match &self.eos_token_id {
            Some(OneOrMany::One(id)) => std::slice::from_ref(id),
            Some(OneOrMany::Many(ids)) => ids,
            None => &[],
        }
    }
}

fn silu() -> String {
    "silu".into()
}

fn eps() -> f64 {
    1e-6
}
