//! The fields of `LohaConfig` and `LokrConfig`.

use super::{NAMES, ReadConfig, Reader, map, modules, number, pattern};
use crate::error::{Error, Result};
use crate::lora::{Loha, LohaConfig, Lokr, LokrConfig, LokrInit, LycorisConfig};
use serde_json::{Map, Value, json};

/// Fields that have a place of their own.
const TYPED: [&str; 17] = [
    "alpha",
    "alpha_pattern",
    "decompose_both",
    "decompose_factor",
    "exclude_modules",
    "init_weights",
    "layers_pattern",
    "layers_to_transform",
    "module_dropout",
    "modules_to_save",
    "r",
    "rank_dropout",
    "rank_dropout_scale",
    "rank_pattern",
    "target_modules",
    "use_effective_conv2d",
    "w1_pattern",
];

/// The fields that only one method has.
pub(super) trait Fields {
    /// Those of [`TYPED`] that another method has.
    const FOREIGN: &'static [&'static str];

    fn fields(&self) -> Value;

    fn read(reader: &Reader) -> Result<Self>
    where
        Self: Sized;
}

impl Fields for Loha {
    const FOREIGN: &'static [&'static str] =
        &["decompose_both", "decompose_factor", "rank_dropout_scale", "w1_pattern"];

    fn fields(&self) -> Value {
        json!({"init_weights": self.init_weights})
    }

    fn read(reader: &Reader) -> Result<Self> {
        Ok(Loha { init_weights: reader.flag("init_weights")?.unwrap_or(Loha::default().init_weights) })
    }
}

impl Fields for Lokr {
    const FOREIGN: &'static [&'static str] = &[];

    fn fields(&self) -> Value {
        let Lokr { init_weights, decompose_both, decompose_factor, rank_dropout_scale, w1_pattern } = self;
        let mut fields = json!({
            "decompose_both": decompose_both,
            "decompose_factor": decompose_factor,
            "init_weights": match init_weights {
                LokrInit::Default => json!(true),
                LokrInit::Random => json!(false),
                LokrInit::Lycoris => json!("lycoris"),
            },
            "rank_dropout_scale": rank_dropout_scale,
        });
        // Only where it says something: PEFT doesn't know it.
        if !w1_pattern.is_empty() {
            fields["w1_pattern"] = pattern(w1_pattern, |sizes| json!(sizes));
        }
        fields
    }

    fn read(reader: &Reader) -> Result<Self> {
        let default = Lokr::default();
        Ok(Lokr {
            init_weights: match reader.get("init_weights") {
                None => default.init_weights,
                Some(Value::Bool(on)) => (*on).into(),
                Some(Value::String(name)) if name == "lycoris" => LokrInit::Lycoris,
                Some(value) => return Err(Error::Unsupported { fields: vec![format!("init_weights = {value}")] }),
            },
            decompose_both: reader.flag("decompose_both")?.unwrap_or(default.decompose_both),
            decompose_factor: reader.read("decompose_factor", "an integer")?.unwrap_or(default.decompose_factor),
            rank_dropout_scale: reader.flag("rank_dropout_scale")?.unwrap_or(default.rank_dropout_scale),
            w1_pattern: reader.pattern("w1_pattern", "two sizes by patterns")?,
        })
    }
}

/// All fields, over those that every kind has.
pub(super) fn write<M: Fields>(config: &LycorisConfig<M>, fields: &mut Map<String, Value>) {
    fields.extend(config.other.clone());
    fields.extend(map(config.method.fields()));
    fields.extend(map(json!({
        "alpha": number(config.alpha),
        "alpha_pattern": pattern(&config.alpha_pattern, number),
        "exclude_modules": modules(&config.exclude_modules),
        "layers_pattern": config.layers_pattern,
        "layers_to_transform": config.layers_to_transform,
        "module_dropout": config.module_dropout,
        "modules_to_save": config.modules_to_save,
        "r": config.r,
        "rank_dropout": config.rank_dropout,
        "rank_pattern": pattern(&config.rank_pattern, Value::from),
        "target_modules": modules(&config.target_modules),
        "use_effective_conv2d": config.use_effective_conv2d,
    })));
}

pub(super) fn read_loha(reader: &Reader) -> Result<ReadConfig> {
    let (config, unknown) = read::<Loha>(reader)?;
    Ok(ReadConfig { config: LohaConfig::validate(config)?.into(), unknown })
}

pub(super) fn read_lokr(reader: &Reader) -> Result<ReadConfig> {
    let (config, unknown) = read::<Lokr>(reader)?;
    Ok(ReadConfig { config: LokrConfig::validate(config)?.into(), unknown })
}

fn read<M: Fields + Default>(reader: &Reader) -> Result<(LycorisConfig<M>, Vec<String>)> {
    let typed: Vec<&str> = TYPED.into_iter().filter(|key| !M::FOREIGN.contains(key)).collect();
    let (other, unknown) = reader.others(&typed, |_| false);
    let default = LycorisConfig::<M>::default();
    let config = LycorisConfig {
        r: reader.read("r", "an integer")?.unwrap_or(default.r),
        alpha: reader.read("alpha", "a number")?.unwrap_or(default.alpha),
        rank_dropout: reader.read("rank_dropout", "a number")?.unwrap_or(default.rank_dropout),
        module_dropout: reader.read("module_dropout", "a number")?.unwrap_or(default.module_dropout),
        use_effective_conv2d: reader.flag("use_effective_conv2d")?.unwrap_or(default.use_effective_conv2d),
        target_modules: reader.modules("target_modules")?,
        exclude_modules: reader.modules("exclude_modules")?,
        layers_to_transform: reader.read("layers_to_transform", "an integer or a list of integers")?,
        layers_pattern: reader.read("layers_pattern", "a name or a list of names")?,
        rank_pattern: reader.pattern("rank_pattern", "integers by patterns")?,
        alpha_pattern: reader.pattern("alpha_pattern", "numbers by patterns")?,
        modules_to_save: reader.read("modules_to_save", NAMES)?,
        dtype: None,
        method: M::read(reader)?,
        other,
    };
    Ok((config, unknown))
}
