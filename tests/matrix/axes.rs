//! The axes of the configurations, and a choice of them in which every pair of values occurs.

/// What varies, with its values.
pub const AXES: [(&str, &[&str]); 7] = [
    (
        "layer",
        &[
            "linear",
            "linear_no_bias",
            "hf_conv1d",
            "conv1d",
            "conv1d_groups",
            "conv2d_stride",
            "conv2d_dilation",
            "conv2d_same",
            "conv2d_reflect",
            "conv2d_circular",
            "conv2d_groups",
            "conv2d_pointwise",
            "conv3d",
            "conv3d_pointwise",
            "embedding",
            "embedding_padding",
        ],
    ),
    ("base", &["dense", "int8", "nf4", "llm_int8", "nf4+dq", "nf4_bnb"]),
    ("dtype", &["f32", "bf16", "bf16_adapters"]),
    ("variant", &["lora", "rslora", "dora", "dora_rslora", "lora_bias"]),
    ("init", &["true", "false", "gaussian", "orthogonal", "pissa", "pissa_niter_8", "olora", "loftq"]),
    (
        "fields",
        &[
            "plain",
            "regex",
            "all_linear",
            "rank_pattern",
            "alpha_pattern",
            "both_patterns",
            "layers_to_transform",
            "exclude_modules",
            "modules_to_save",
            "bias_all",
            "bias_lora_only",
            "tokens",
        ],
    ),
    ("training", &["sgd", "adamw", "sgd_dropout", "adamw_dropout"]),
];

/// The axes of which every combination occurs, with how many of their values.
const FULL: [usize; 3] = [16, 3, 3];

/// One value of each axis, by its place.
pub type Row = [usize; AXES.len()];

/// The value of an axis by its name.
pub fn value(row: &Row, axis: &str) -> &'static str {
    let at = AXES.iter().position(|(name, _)| *name == axis).unwrap();
    AXES[at].1[row[at]]
}

/// An axis and a value of it.
type Choice = (usize, usize);

/// Whether two values can go together. All that is excluded is meaningless here and in PEFT.
fn fits(a: Choice, b: Choice) -> bool {
    let named = |(axis, value): Choice| (AXES[axis].0, AXES[axis].1[value]);
    let pair = [named(a), named(b)];
    let of = |axis: &str| pair.iter().find(|(name, _)| *name == axis).map(|(_, value)| *value);
    let is_conv = |layer: &str| layer.starts_with("conv");
    let is_linear = |layer: &str| layer.starts_with("linear") || layer == "hf_conv1d";
    let wants_matrix = |init: &str| !["true", "false", "gaussian"].contains(&init);
    // bitsandbytes has linear layers, and its adapted forward passes on the CPU are for training.
    if of("base") == Some("nf4_bnb") {
        let (layer, init) = (of("layer"), of("init"));
        let linear = layer.is_none_or(|layer| layer.starts_with("linear"));
        let untouched = init.is_none_or(|init| !init.starts_with("pissa") && !["olora", "loftq"].contains(&init));
        let live = of("training").is_some_and(|training| training.ends_with("_dropout"));
        // It fails to draw an orthogonal start for its packed bytes.
        return linear
            && untouched
            && !live
            && init != Some("orthogonal")
            && of("dtype").is_none_or(|kind| kind == "f32");
    }
    let (layer, init, variant, fields) = (of("layer"), of("init"), of("variant"), of("fields"));
    let wrong = match (layer, init, variant, fields) {
        (Some(layer), Some(init), _, _) => !is_linear(layer) && wants_matrix(init),
        // PEFT's A of a grouped convolution sees all channels: the weight has no place for the product.
        (Some(layer), _, Some(variant), _) => {
            (is_conv(layer) && layer.ends_with("groups") && variant.starts_with("dora"))
                || (layer.starts_with("embedding") && variant == "lora_bias")
        }
        // The model pads by an operator of its own, and dropout draws a mask for the padded input.
        (Some("conv2d_same" | "conv2d_reflect" | "conv2d_circular"), None, None, None) => {
            of("training").is_some_and(|training| training.ends_with("_dropout"))
        }
        (Some(layer), _, _, Some("tokens")) => !layer.starts_with("embedding"),
        (Some(layer), _, _, Some("all_linear")) => !is_linear(layer),
        (_, Some(init), Some("lora_bias"), _) => !["true", "false"].contains(&init),
        // It quantises the weight itself.
        (_, Some("loftq"), _, _) => of("base").is_some_and(|base| base != "dense"),
        // What is left of a weight is rounded to f16 first, and the last bit of f32 decides how.
        (_, Some("olora" | "pissa" | "pissa_niter_8"), _, _) => of("base") == Some("llm_int8"),
        _ => false,
    };
    !wrong
}

/// Every pair of values of two axes that fit, the other axes too.
pub fn pairs() -> Vec<(Choice, Choice)> {
    let choices: Vec<Choice> =
        AXES.iter().enumerate().flat_map(|(axis, (_, values))| (0..values.len()).map(move |v| (axis, v))).collect();
    let later = |a: Choice| choices.iter().copied().filter(move |b| b.0 > a.0);
    let pairs = choices.iter().flat_map(|a| later(*a).map(|b| (*a, b))).filter(|(a, b)| fits(*a, *b));
    pairs.filter(|(a, b)| complete(&[*a, *b], &[]).is_some()).collect()
}

pub fn covers(row: &Row, (a, b): &(Choice, Choice)) -> bool {
    row[a.0] == a.1 && row[b.0] == b.1
}

/// Every combination of layer, base and dtype, then what is left of the pairs. The other axes take
/// the values that cover most pairs, so that few rows do. The same rows each time.
pub fn rows() -> Vec<Row> {
    let mut left = pairs();
    let mut rows: Vec<Row> = Vec::new();
    let mut add = |given: &[Choice], left: &mut Vec<(Choice, Choice)>| {
        let Some(row) = complete(given, left) else { panic!("{given:?} doesn't fit") };
        left.retain(|pair| !covers(&row, pair));
        rows.push(row);
    };
    for layer in 0..FULL[0] {
        for base in 0..FULL[1] {
            for dtype in 0..FULL[2] {
                add(&[(0, layer), (1, base), (2, dtype)], &mut left);
            }
        }
    }
    while let Some((a, b)) = left.first().copied() {
        add(&[a, b], &mut left);
    }
    rows
}

/// The values given, and for each other axis the one that fits and covers most of the pairs left;
/// `None` if the values given leave none.
fn complete(given: &[Choice], left: &[(Choice, Choice)]) -> Option<Row> {
    let mut chosen = given.to_vec();
    for (axis, (_, values)) in AXES.iter().enumerate() {
        if chosen.iter().any(|(taken, _)| *taken == axis) {
            continue;
        }
        let new = |value: usize| {
            let pair = |other: &Choice| {
                let choice = (axis, value);
                if other.0 < axis { (*other, choice) } else { (choice, *other) }
            };
            chosen.iter().filter(|other| left.contains(&pair(other))).count()
        };
        let open = |value: usize| left.iter().filter(|(a, b)| [*a, *b].contains(&(axis, value))).count();
        let fitting = (0..values.len()).filter(|v| chosen.iter().all(|other| fits(*other, (axis, *v))));
        let best = fitting.max_by_key(|v| (new(*v), open(*v), values.len() - v))?;
        chosen.push((axis, best));
    }
    chosen.sort();
    chosen.iter().map(|(_, value)| *value).collect::<Vec<_>>().try_into().ok()
}
