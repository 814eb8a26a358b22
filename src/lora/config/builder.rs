//! The builder of `LoraConfig`.

use super::{Bias, InitLoraWeights, LayerPattern, LoftqConfig, LoraConfig, OneOrMany, TargetModules, TokenIndices};
use crate::error::Result;
use crate::lora::init::data::{CordaConfig, EvaConfig, LoraGaConfig};
use serde_json::{Value, json};
use tch::Kind;

/// The setters of what every kind of adapter's configuration has.
macro_rules! shared_setters {
    () => {
        /// Rank, at least 1.
        pub fn r(self, r: i64) -> Self {
            self.with(|c| c.r = r)
        }

        /// Names or a regular expression of modules that are left out although the
        /// target means them.
        pub fn exclude_modules(self, modules: impl Into<TargetModules>) -> Self {
            self.with(|c| c.exclude_modules = Some(modules.into()))
        }

        /// Adapts in these layers only: the first number in a module's path, after
        /// at least one other segment. Entries of the target that are whole paths
        /// count in any layer. For a target that is a list.
        ///
        /// ```
        /// use tch_peft::LoraConfig;
        ///
        /// let config = LoraConfig::builder().target_modules(["q_proj"]).layers_to_transform([0, 2]).build()?;
        /// let paths = ["model.h.0.q_proj", "model.h.1.q_proj", "model.h.2.q_proj"];
        /// assert_eq!(config.matched(paths)?, ["model.h.0.q_proj", "model.h.2.q_proj"]);
        /// # Ok::<(), tch_peft::Error>(())
        /// ```
        pub fn layers_to_transform(self, layers: impl Into<OneOrMany<i64>>) -> Self {
            self.with(|c| c.layers_to_transform = Some(layers.into()))
        }

        /// The names of the lists of layers, where `layers_to_transform` must not
        /// count the first number of a path: `h`, `layers`, …
        pub fn layers_pattern(self, names: impl Into<OneOrMany<String>>) -> Self {
            self.with(|c| c.layers_pattern = Some(names.into()))
        }

        /// Ranks of some of the layers, see [`LayerPattern`].
        ///
        /// ```
        /// use tch_peft::LoraConfig;
        ///
        /// let config = LoraConfig::builder()
        ///     .r(8)
        ///     .target_modules(["q_proj", "v_proj"])
        ///     .rank_pattern([("v_proj", 4), (r"layers\.0\.q_proj", 2)])
        ///     .build()?;
        /// let ranks: Vec<i64> = config
        ///     .layer_settings(["layers.0.q_proj", "layers.1.q_proj", "layers.1.v_proj"])
        ///     .iter()
        ///     .map(|settings| settings.r)
        ///     .collect();
        /// assert_eq!(ranks, [2, 8, 4]);
        /// # Ok::<(), tch_peft::Error>(())
        /// ```
        pub fn rank_pattern<S: Into<String>>(self, ranks: impl IntoIterator<Item = (S, i64)>) -> Self {
            self.with(|c| c.rank_pattern = LayerPattern::new(ranks))
        }

        /// Numerators of the scale of some of the layers, see [`LayerPattern`].
        pub fn alpha_pattern<S: Into<String>>(self, alphas: impl IntoIterator<Item = (S, f64)>) -> Self {
            self.with(|c| c.alpha_pattern = LayerPattern::new(alphas))
        }

        /// Modules of which a full copy is trained and saved: whole paths or their
        /// last segments.
        pub fn modules_to_save<S: Into<String>>(self, modules: impl IntoIterator<Item = S>) -> Self {
            self.with(|c| c.modules_to_save = Some(modules.into_iter().map(Into::into).collect()))
        }

        /// What the model is for, as PEFT names it: `CAUSAL_LM`, `SEQ_CLS`, …
        /// Recorded for other programs.
        pub fn task_type(self, name: &str) -> Self {
            self.with(|c| drop(c.other.insert("task_type".into(), json!(name))))
        }

        /// Where the base came from. Recorded for other programs.
        pub fn base_model_name_or_path(self, name: &str) -> Self {
            self.with(|c| drop(c.other.insert("base_model_name_or_path".into(), json!(name))))
        }
    };
}
pub(in crate::lora) use shared_setters;

/// Makes a [`LoraConfig`].
///
/// ```
/// use tch_peft::{Bias, InitLoraWeights, LoraConfig};
///
/// let config = LoraConfig::builder()
///     .r(16)
///     .lora_alpha(32.0)
///     .lora_dropout(0.05)
///     .target_modules(["q_proj", "v_proj"])
///     .exclude_modules(r"layers\.0\..*")
///     .modules_to_save(["lm_head"])
///     .bias(Bias::LoraOnly)
///     .use_dora(true)
///     .init_lora_weights(InitLoraWeights::Gaussian)
///     .build()?;
/// assert!(LoraConfig::builder().r(0).target_modules(["q_proj"]).build().is_err());
/// # Ok::<(), tch_peft::Error>(())
/// ```
#[derive(Debug, Clone, Default)]
#[must_use = "call build()"]
pub struct LoraConfigBuilder {
    config: LoraConfig,
}

impl LoraConfigBuilder {
    fn with(mut self, change: impl FnOnce(&mut LoraConfig)) -> Self {
        change(&mut self.config);
        self
    }

    shared_setters!();

    /// The numerator of the scale, see [`LoraConfig::scaling`].
    pub fn lora_alpha(self, alpha: f64) -> Self {
        self.with(|c| c.lora_alpha = alpha)
    }

    /// Probability in [0, 1) that an input feature is dropped on the way to A
    /// while training; the others are scaled by 1/(1 − p).
    pub fn lora_dropout(self, p: f64) -> Self {
        self.with(|c| c.lora_dropout = p)
    }

    /// A list of names, a regular expression, or `"all-linear"`.
    pub fn target_modules(self, target: impl Into<TargetModules>) -> Self {
        self.with(|c| c.target_modules = Some(target.into()))
    }

    /// Which biases of the base are trained.
    pub fn bias(self, bias: Bias) -> Self {
        self.with(|c| c.bias = bias)
    }

    /// Gives B a bias.
    pub fn lora_bias(self, on: bool) -> Self {
        self.with(|c| c.lora_bias = on)
    }

    /// The weights are stored as (in, out), as GPT-2's `Conv1D` does.
    pub fn fan_in_fan_out(self, on: bool) -> Self {
        self.with(|c| c.fan_in_fan_out = on)
    }

    /// Scale by alpha/√r instead of alpha/r.
    pub fn use_rslora(self, on: bool) -> Self {
        self.with(|c| c.use_rslora = on)
    }

    /// Train magnitude and direction apart (DoRA, arXiv:2402.09353).
    pub fn use_dora(self, on: bool) -> Self {
        self.with(|c| c.use_dora = on)
    }

    /// How A and B start: `true`, `false`, or an [`InitLoraWeights`].
    pub fn init_lora_weights(self, init: impl Into<InitLoraWeights>) -> Self {
        self.with(|c| c.init_lora_weights = init.into())
    }

    /// How `init_lora_weights` of `eva` goes about it.
    pub fn eva_config(self, config: EvaConfig) -> Self {
        self.part("eva_config", json!(config))
    }

    /// How `init_lora_weights` of `corda` goes about it. PEFT's fields for files
    /// of its own are left out.
    pub fn corda_config(self, config: CordaConfig) -> Self {
        let files = json!({
            "cache_file": null, "covariance_file": null, "corda_method": config.corda_method,
            "prune_temporary_fields": true, "use_float16_for_covariance": false, "verbose": false,
        });
        self.part("corda_config", files)
    }

    /// How `init_lora_weights` of `lora_ga` goes about it.
    pub fn lora_ga_config(self, config: LoraGaConfig) -> Self {
        self.part("lora_ga_config", json!(config))
    }

    /// How `init_lora_weights` of `loftq` goes about it.
    pub fn loftq_config(self, config: LoftqConfig) -> Self {
        self.part("loftq_config", config.to_json())
    }

    /// Pools inputs over groups of features (QALoRA, arXiv:2309.14717), on
    /// linear layers that are quantised in groups.
    ///
    /// ```
    /// # use tch::{Device, nn};
    /// use tch_peft::{Base, LoraConfig, LoraModel, QuantConfig};
    ///
    /// # let vs = nn::VarStore::new(Device::Cpu);
    /// # let net = nn::linear(vs.root() / "proj", 128, 64, Default::default());
    /// let base = Base::new(vs, net).quantize(&QuantConfig::int4().group_size(32).build()?)?;
    /// let config = LoraConfig::builder().r(4).target_modules(["proj"]).use_qalora(true).qalora_group_size(32).build()?;
    /// let model = LoraModel::wrap(base, config)?;
    /// assert_eq!(model.parameters()[0].tensor.size(), [4, 128 / 32]); // A sees a value for each group
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    pub fn use_qalora(self, on: bool) -> Self {
        self.part("use_qalora", json!(on))
    }

    /// Features in a group of QALoRA's, by default 16.
    pub fn qalora_group_size(self, size: i64) -> Self {
        self.part("qalora_group_size", json!(size))
    }

    fn part(self, key: &str, value: Value) -> Self {
        self.with(|c| drop(c.other.insert(key.into(), value)))
    }

    /// Rows of embeddings that are trained as they are: of the input
    /// embedding, or of each module named.
    ///
    /// ```
    /// use tch_peft::LoraConfig;
    ///
    /// // Rows of the input embedding, or of the modules named.
    /// let config = LoraConfig::builder().target_modules(["q_proj"]).trainable_token_indices([32000, 32001]).build()?;
    /// let named = LoraConfig::builder().target_modules(["q_proj"]).trainable_token_indices([("wte", [7, 8])]).build()?;
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    pub fn trainable_token_indices(self, rows: impl Into<TokenIndices>) -> Self {
        self.with(|c| c.trainable_token_indices = Some(rows.into()))
    }

    /// Parameters that are adapted by their own names, whole or the last
    /// segments: matrices (out, in), and stacks (experts, out, in) with the rank
    /// r for each expert, see [`WeightRole::Experts`](crate::WeightRole::Experts).
    ///
    /// ```
    /// use tch::{Device, Kind, Tensor, nn};
    /// use tch_peft::{Base, LoraConfig, LoraModel};
    ///
    /// let vs = nn::VarStore::new(Device::Cpu);
    /// let stack = vs.root().sub("experts").randn("down_proj", &[4, 8, 16], 0.0, 0.1); // four matrices (8, 16)
    /// let config = LoraConfig::builder().r(2).target_parameters(["experts.down_proj"]).build()?;
    /// let model = LoraModel::wrap(Base::from(vs), config)?;
    /// let y = Tensor::ones([3, 16], (Kind::Float, Device::Cpu)).matmul(&stack.get(1).tr()); // adapted
    /// assert_eq!(model.parameters()[0].tensor.size(), [4 * 2, 16]);
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    pub fn target_parameters<S: Into<String>>(self, names: impl IntoIterator<Item = S>) -> Self {
        self.with(|c| c.target_parameters = Some(names.into_iter().map(Into::into).collect()))
    }

    /// Keeps what is trained of a tied weight tied: the adapter (or copy) of an
    /// embedding takes part in the output layer that shares its table too.
    ///
    /// ```
    /// # use tch::{Device, nn};
    /// use tch_peft::{Base, LoraConfig, LoraModel};
    ///
    /// let vs = nn::VarStore::new(Device::Cpu);
    /// let table = vs.root().sub("embed_tokens").randn("weight", &[10, 4], 0.0, 1.0);
    /// let head = vs.root().sub("lm_head").add("weight", table, true); // the same tensor
    /// let config = LoraConfig::builder().r(2).target_modules(["embed_tokens", "lm_head"]).ensure_weight_tying(true);
    /// let model = LoraModel::wrap(Base::from(vs), config.build()?)?;
    /// assert_eq!(model.parameters().len(), 2); // one A and one B for both
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    pub fn ensure_weight_tying(self, on: bool) -> Self {
        self.with(|c| c.ensure_weight_tying = on)
    }

    /// Stacks layers anew from ranges [start, end) of the base's.
    pub fn layer_replication(self, ranges: impl IntoIterator<Item = (i64, i64)>) -> Self {
        self.with(|c| c.layer_replication = Some(ranges.into_iter().collect()))
    }

    /// The dtype that A and B, and the copies of `modules_to_save`, biases and
    /// token rows, are kept and trained in. By default f32, also on
    /// a base of bf16 or f16, as in PEFT; f64 on a base of f64. The products
    /// run in the dtype of the model's activations, whatever this is. A file
    /// keeps the dtype that the tensors have.
    ///
    /// ```
    /// use tch::Kind;
    /// use tch_peft::LoraConfig;
    ///
    /// let config = LoraConfig::builder().target_modules(["q_proj"]).dtype(Kind::BFloat16).build()?;
    /// assert_eq!(config.dtype(), Some(Kind::BFloat16));
    /// # Ok::<(), tch_peft::Error>(())
    /// ```
    pub fn dtype(self, kind: Kind) -> Self {
        self.with(|c| c.dtype = Some(kind))
    }

    /// Checks the values.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config), naming the field.
    pub fn build(self) -> Result<LoraConfig> {
        self.config.validate()
    }
}
