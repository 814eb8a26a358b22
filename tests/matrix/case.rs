//! One configuration: its name, its `LoraConfig` and its base.

use crate::common::device;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tch::{Device, Kind};
use tch_peft::{
    AdamW, Base, Bias, InitLoraWeights, LoraConfig, NamedParameter, Optimizer, QuantConfig, Scheme, Sgd, TargetModules,
    TorchScript, Treatment, WeightRole,
};

use crate::axes::{Row, value};

/// AdamW's, as large as the gradients: else rounding decides the sign of the steps of those near zero.
const EPS: f64 = 5e-2;

pub struct Case {
    pub name: String,
    pub folder: PathBuf,
    row: Row,
}

impl Case {
    pub fn new(dir: &Path, at: usize, row: Row) -> Self {
        let values: Vec<&str> = crate::axes::AXES.iter().map(|(axis, _)| value(&row, axis)).collect();
        let name = format!("{at:03}-{}", values.join("-"));
        Case { folder: dir.join(&name), name, row }
    }

    pub fn is(&self, axis: &str, wanted: &str) -> bool {
        value(&self.row, axis) == wanted
    }

    fn get(&self, axis: &str) -> &'static str {
        value(&self.row, axis)
    }

    /// What matrix_reference.py is told.
    pub fn to_json(&self) -> Value {
        json!({
            "name": self.name,
            "layer": self.get("layer"),
            "base": self.get("base"),
            "dtype_name": self.get("dtype"),
            "training": self.get("training").trim_end_matches("_dropout"),
            "lr": self.lr(),
            "eps": EPS,
            "seed": self.name[..3].parse::<i64>().unwrap(),
        })
    }

    pub fn tolerance(&self) -> f64 {
        if self.is("dtype", "f32") { 1e-5 } else { 2e-2 }
    }

    /// A rate at which three steps change the output clearly, and don't run away.
    fn lr(&self) -> f64 {
        let layer = self.get("layer");
        match (layer.starts_with("embedding"), layer.starts_with("conv"), self.uses_adamw()) {
            (true, _, true) => 5e-2,
            (true, _, false) => 0.5,
            (_, true, true) => 2e-2,
            (_, true, false) => 0.02,
            (_, _, true) => 3e-3,
            _ => 0.01,
        }
    }

    fn uses_adamw(&self) -> bool {
        self.get("training").starts_with("adamw")
    }

    pub fn optimizer(&self, parameters: Vec<NamedParameter>) -> Box<dyn Optimizer> {
        match self.uses_adamw() {
            true => Box::new(AdamW::builder().lr(self.lr()).eps(EPS).build(parameters).unwrap()),
            false => Box::new(Sgd::builder().lr(self.lr()).momentum(0.9).build(parameters).unwrap()),
        }
    }

    /// Outputs that the tests are to tell apart differ by so much at least.
    pub fn effect(&self) -> f64 {
        match (self.get("dtype"), device()) {
            ("f32", _) => 1e-3,
            (_, Device::Cpu) => 2.5e-2,
            // Where a configuration with dropout trains without it, and so less.
            _ => 2.2e-2,
        }
    }

    /// Whether A and B are made from the weight, the same each time.
    pub fn starts_from_the_weight(&self) -> bool {
        ["pissa", "pissa_niter_8", "olora", "loftq"].contains(&self.get("init"))
    }

    /// None elsewhere than on the CPU, as another generator draws the masks.
    fn dropout(&self) -> f64 {
        if self.get("training").ends_with("_dropout") && device() == Device::Cpu { 0.25 } else { 0.0 }
    }

    pub fn config(&self) -> LoraConfig {
        let (variant, init) = (self.get("variant"), self.get("init"));
        let config = LoraConfig::builder()
            .r(4)
            .lora_alpha(8.0)
            .fan_in_fan_out(self.is("layer", "hf_conv1d"))
            .use_rslora(variant.ends_with("rslora"))
            .use_dora(variant.starts_with("dora"))
            .lora_bias(variant == "lora_bias")
            .lora_dropout(self.dropout())
            .init_lora_weights(match init {
                "true" => InitLoraWeights::Default,
                "false" => InitLoraWeights::Random,
                "gaussian" => InitLoraWeights::Gaussian,
                "orthogonal" => InitLoraWeights::Orthogonal,
                "pissa" => InitLoraWeights::Pissa,
                "pissa_niter_8" => InitLoraWeights::PissaNiter(8),
                "olora" => InitLoraWeights::Olora,
                "loftq" => InitLoraWeights::Loftq,
                other => panic!("{other}"),
            })
            .target_modules(["h.0.layer", "h.1.layer"]);
        let config = match self.get("fields") {
            "plain" => config,
            "regex" => config.target_modules(r"h\.\d+\.lay.*"),
            "all_linear" => config.target_modules(TargetModules::AllLinear),
            "rank_pattern" => config.rank_pattern([("h.1.layer", 2)]),
            "alpha_pattern" => config.alpha_pattern([("h.0.layer", 3.0)]),
            "both_patterns" => config.rank_pattern([(r"^h\.0\.layer", 6)]).alpha_pattern([("layer", 5.0)]),
            "layers_to_transform" => config.target_modules(["layer"]).layers_to_transform(1).layers_pattern("h"),
            "exclude_modules" => config.exclude_modules(["h.0.layer"]),
            "modules_to_save" => config.modules_to_save(["head"]),
            "bias_all" => config.bias(Bias::All),
            "bias_lora_only" => config.bias(Bias::LoraOnly),
            "tokens" => config.target_modules(["h.0.layer"]).trainable_token_indices([("h.1.layer", [1, 4])]),
            other => panic!("{other}"),
        };
        let config = if self.is("dtype", "bf16_adapters") { config.dtype(Kind::BFloat16) } else { config };
        config.build().unwrap_or_else(|error| panic!("{}: {error}", self.name))
    }

    /// The base, its blocks packed.
    pub fn base(&self) -> Base<TorchScript> {
        let base = Base::torchscript_on_device(self.folder.join("model.pt"), device()).unwrap();
        // A trace doesn't keep the number of groups.
        let base = match self.get("layer") {
            "conv1d_groups" | "conv2d_groups" => base.declare("layer", WeightRole::Conv { groups: 2 }),
            _ => base,
        };
        let scheme = match self.get("base") {
            "dense" => return base,
            "int8" => Scheme::Int8,
            "llm_int8" => Scheme::LlmInt8,
            "nf4" | "nf4_bnb" => Scheme::NF4,
            "nf4+dq" => Scheme::Nf4 { block_size: 64, double_quant: true },
            other => panic!("{other}"),
        };
        let config = QuantConfig::builder(scheme).skip(["head"]).rule("h.*.layer", Treatment::from(scheme));
        base.quantize(&config.build().unwrap()).unwrap()
    }
}
