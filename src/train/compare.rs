//! What differs between recorded and given settings, field by field.

use crate::error::{Error, Result};
use serde_json::Value;

/// Refuses settings that differ from the recorded ones, naming each field.
pub(crate) fn same_config(what: &str, recorded: &Value, given: &Value) -> Result<()> {
    let differences = differences(recorded, given);
    if differences.is_empty() {
        return Ok(());
    }
    Err(Error::DifferentConfig { what: what.into(), differences })
}

/// One line for each field in which `given` differs from `recorded`.
pub(crate) fn differences(recorded: &Value, given: &Value) -> Vec<String> {
    let mut lines = Vec::new();
    walk("", Some(recorded), Some(given), &mut lines);
    lines
}

fn walk(path: &str, recorded: Option<&Value>, given: Option<&Value>, lines: &mut Vec<String>) {
    let join = |key: &str| if path.is_empty() { key.to_string() } else { format!("{path}.{key}") };
    match (recorded, given) {
        (Some(Value::Object(recorded)), Some(Value::Object(given))) => {
            for (key, value) in recorded {
                walk(&join(key), Some(value), given.get(key), lines);
            }
            for (key, value) in given.iter().filter(|(key, _)| !recorded.contains_key(*key)) {
                walk(&join(key), None, Some(value), lines);
            }
        }
        (Some(Value::Array(recorded)), Some(Value::Array(given))) if has_objects(recorded) => {
            for i in 0..recorded.len().max(given.len()) {
                walk(&join(&i.to_string()), recorded.get(i), given.get(i), lines);
            }
        }
        (recorded, given) if recorded == given => {}
        (recorded, given) => {
            let field = if path.is_empty() { "value" } else { path };
            lines.push(format!("{field}: recorded {}, given {}", show(recorded), show(given)));
        }
    }
}

/// Lists of plain values read better whole: `betas: recorded [0.9,0.99], …`.
fn has_objects(list: &[Value]) -> bool {
    list.iter().any(Value::is_object)
}

fn show(value: Option<&Value>) -> String {
    value.map_or("nothing".into(), Value::to_string)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn each_differing_leaf_is_one_line() {
        let recorded = json!({"lr": 1e-4, "betas": [0.9, 0.99], "groups": [{"wd": 0.0}], "old": 1});
        let given = json!({"lr": 1e-4, "betas": [0.9, 0.95], "groups": [{"wd": 0.1}, {"wd": 1.0}], "new": 2});
        assert_eq!(
            differences(&recorded, &given),
            [
                "betas: recorded [0.9,0.99], given [0.9,0.95]",
                "groups.0.wd: recorded 0.0, given 0.1",
                "groups.1: recorded nothing, given {\"wd\":1.0}",
                "old: recorded 1, given nothing",
                "new: recorded nothing, given 2",
            ]
        );
        assert!(differences(&recorded, &recorded).is_empty());
    }

    #[test]
    fn neighbouring_floats_differ() {
        let lr = 1e-4_f64;
        let lines = differences(&json!({"lr": lr}), &json!({"lr": lr.next_up()}));
        assert_eq!(lines.len(), 1);
    }
}
