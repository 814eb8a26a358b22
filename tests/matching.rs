//! Which modules a configuration means, against PEFT's own rules.

mod common;

use common::{peer, python};
use serde_json::Value;
use tch_peft::{Error, LoraConfig};

fn strings(value: &Value) -> Vec<&str> {
    value.as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect()
}

/// tests/python/matching_reference.py holds the table: names of modules, and configurations, each
/// with what PEFT matches, and the rank and alpha that it gives to each name.
#[test]
fn the_table_is_matched_as_peft_matches_it() {
    if python().is_none() {
        return;
    }
    let dir = common::fresh_dir("matching");
    let path = dir.join("table.json");
    peer("matching_reference.py", &[&path]);
    let table: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let names = strings(&table["names"]);
    let cases = table["cases"].as_array().unwrap();
    // PEFT's own table has 46 rows of one name and one configuration each.
    assert!(names.len() > 120 && cases.len() > 120, "{} names, {} configurations", names.len(), cases.len());
    let mut matches = 0;
    for case in cases {
        let config = &case["config"];
        std::fs::write(dir.join("adapter_config.json"), config.to_string()).unwrap();
        let about = format!(
            "target {}, exclude {}, layers {} in {}, saved {}, ranks {}",
            config["target_modules"],
            config["exclude_modules"],
            config["layers_to_transform"],
            config["layers_pattern"],
            config["modules_to_save"],
            config["rank_pattern"]
        );
        let config = LoraConfig::from_pretrained(&dir).unwrap_or_else(|error| panic!("{about}: {error}"));
        let found = config.matched(names.iter().copied()).unwrap();
        assert_eq!(found, strings(&case["matched"]), "{about}");
        matches += found.len();
        for (name, layer) in names.iter().zip(config.layer_settings(names.iter().copied())) {
            assert_eq!(layer.r, case["ranks"][name].as_i64().unwrap(), "{about}: rank of {name}");
            assert_eq!(layer.lora_alpha, case["alphas"][name].as_f64().unwrap(), "{about}: alpha of {name}");
            assert_eq!(layer.scaling, layer.lora_alpha / layer.r as f64, "{about}: scale of {name}");
        }
    }
    assert!(matches > 1000, "the table matches {matches} times only");
}

/// Python has expressions that this crate can't run: they are refused, never read as others.
#[test]
fn expressions_that_cannot_be_taken_over_are_refused_by_name() {
    let target = || LoraConfig::builder().target_modules(["q_proj"]);
    let cases = [
        ("target_modules", LoraConfig::builder().target_modules(r"(?!h\.0).*q_proj")),
        ("target_modules", LoraConfig::builder().target_modules(r"(q|v)_\1")),
        ("exclude_modules", target().exclude_modules(r".*(?<=h)\.0")),
        ("layers_pattern", target().layers_to_transform([1]).layers_pattern("(?=h)h")),
        ("rank_pattern", target().rank_pattern([("(?=q)q_proj", 4)])),
        ("alpha_pattern", target().alpha_pattern([("(q", 4.0)])),
    ];
    for (name, builder) in cases {
        let error = builder.build().unwrap_err();
        assert!(matches!(&error, Error::Config { field, .. } if field == name), "{error}");
        assert!(error.to_string().contains("look-around"), "{error}");
    }
}
