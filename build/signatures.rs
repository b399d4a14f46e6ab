//! Reads entry points and parameter structs from preprocessed kernel sources.
//!
//! The grammar is the one `kernels/README.md` allows: `extern "C" __global__ void [__launch_bounds__(N)] name(parameters)`, where a
//! parameter is `[const] type [*] [__restrict__] name`, a plain struct, or `const __grid_constant__ CUtensorMap name`.

/// One .cu file.
pub struct Unit {
    pub stem: String,
    pub kernels: Vec<Kernel>,
    pub structs: Vec<Struct>,
}

/// One entry point.
pub struct Kernel {
    pub name: String,
    pub params: Vec<Field>,
    pub max_threads: u32,
    pub hot: bool,
}

/// A struct that kernels take by value.
#[derive(Clone, PartialEq)]
pub struct Struct {
    pub name: String,
    pub fields: Vec<Field>,
}

/// A parameter or struct field.
#[derive(Clone, PartialEq)]
pub struct Field {
    pub name: String,
    pub ty: Type,
    /// Length of an array field.
    pub array: Option<usize>,
    /// As it stands in the source.
    pub text: String,
}

/// Types that cross the launch boundary, by their Rust names.
#[derive(Clone, PartialEq)]
pub enum Type {
    Scalar(&'static str),
    ConstPtr(&'static str),
    MutPtr(&'static str),
    Struct(String),
    TensorMap,
}

impl Unit {
    pub fn parse(stem: &str, preprocessed: &str) -> Result<Unit, String> {
        let tokens = tokenize(preprocessed);
        let mut kernels = Vec::new();
        let mut structs = Vec::new();
        let mut exported = Vec::new();
        let mut i = 0;
        while i < tokens.len() {
            let rest = &tokens[i..];
            if starts(rest, &["extern", "\"C\"", "__global__"]) {
                kernels.push(parse_kernel(&rest[3..]).map_err(|e| format!("kernels/{stem}.cu: {e}"))?);
            } else if rest[0] == "struct" && rest.get(2).is_some_and(|t| t == "{") {
                structs.extend(parse_struct(rest));
            } else if (rest[0] == "RM_EXPORT" || rest[0] == "RM_EXPORT_HOT") && rest.len() > 2 {
                exported.push((rest[2].clone(), rest[0] == "RM_EXPORT_HOT"));
            }
            i += 1;
        }
        for kernel in &mut kernels {
            let mut found = exported.iter().filter(|(name, _)| *name == kernel.name);
            match (found.next(), found.next()) {
                (Some((_, hot)), None) => kernel.hot = *hot,
                (None, _) => {
                    return Err(format!("kernels/{stem}.cu: {} has no RM_EXPORT; add one below it", kernel.name));
                }
                (Some(_), Some(_)) => return Err(format!("kernels/{stem}.cu: {} is exported twice", kernel.name)),
            }
        }
        if let Some((name, _)) = exported.iter().find(|(name, _)| kernels.iter().all(|k| k.name != *name)) {
            return Err(format!("kernels/{stem}.cu: RM_EXPORT({name}) names no extern \"C\" __global__ function"));
        }
        let used = |s: &Struct| kernels.iter().flat_map(|k| &k.params).any(|p| p.ty == Type::Struct(s.name.clone()));
        structs.retain(used);
        for param in kernels.iter().flat_map(|k| &k.params) {
            if let Type::Struct(name) = &param.ty
                && structs.iter().all(|s| s.name != *name)
            {
                return Err(format!(
                    "kernels/{stem}.cu: `{}`: {name} is neither a known type nor a plain struct",
                    param.text
                ));
            }
        }
        Ok(Unit { stem: stem.to_string(), kernels, structs })
    }
}

/// Entry points share one name space, in PTX modules and in the stubs.
pub fn check_unique(units: &[Unit]) -> Result<(), String> {
    let mut seen: Vec<(&str, &str)> = Vec::new();
    for unit in units {
        for kernel in &unit.kernels {
            if let Some((_, other)) = seen.iter().find(|(name, _)| *name == kernel.name) {
                return Err(format!(
                    "kernels/{}.cu: {} is also in kernels/{other}.cu; rename one",
                    unit.stem, kernel.name
                ));
            }
            seen.push((&kernel.name, &unit.stem));
        }
    }
    Ok(())
}

/// Identifiers, numbers, string literals, and single punctuation characters.
fn tokenize(text: &str) -> Vec<String> {
    let mut tokens = Vec::new();
    let mut chars = text.chars().peekable();
    while let Some(&c) = chars.peek() {
        let mut token = String::new();
        if c.is_alphanumeric() || c == '_' {
            while let Some(c) = chars.next_if(|c| c.is_alphanumeric() || *c == '_') {
                token.push(c);
            }
        } else if c == '"' {
            token.extend(chars.next());
            while let Some(c) = chars.next() {
                token.push(c);
                match c {
                    '\\' => token.extend(chars.next()),
                    '"' => break,
                    _ => {}
                }
            }
        } else {
            chars.next();
            if c.is_whitespace() {
                continue;
            }
            token.push(c);
        }
        tokens.push(token);
    }
    tokens
}

fn starts(tokens: &[String], with: &[&str]) -> bool {
    tokens.len() >= with.len() && tokens.iter().zip(with).all(|(a, b)| a == b)
}

/// `tokens` begin behind `__global__`.
fn parse_kernel(tokens: &[String]) -> Result<Kernel, String> {
    let mut i = 0;
    let mut max_threads = 1024;
    loop {
        match tokens.get(i).map(String::as_str) {
            Some("void") => i += 1,
            Some("__launch_bounds__") => {
                let close = closing(tokens, i + 1)?;
                max_threads = product(&tokens[i + 2..close])?;
                i = close + 1;
            }
            _ => break,
        }
    }
    let name = tokens.get(i).cloned().ok_or("an entry point without a name")?;
    let close = closing(tokens, i + 1)?;
    let params = tokens[i + 2..close]
        .split(|t| t == ",")
        .filter(|p| !p.is_empty())
        .map(|p| {
            parse_field(p).ok_or_else(|| {
                format!("{name}: cannot pass `{}` to a kernel; see the grammar in kernels/README.md", p.join(" "))
            })
        })
        .collect::<Result<_, _>>()?;
    Ok(Kernel { name, params, max_threads, hot: false })
}

/// First argument of `__launch_bounds__`: a number or a product of numbers.
fn product(tokens: &[String]) -> Result<u32, String> {
    let first = tokens.split(|t| t == ",").next().unwrap_or_default();
    first
        .split(|t| t == "*")
        .try_fold(1u32, |product, factor| match factor {
            [number] => number.parse::<u32>().ok().and_then(|n| product.checked_mul(n)),
            _ => None,
        })
        .ok_or_else(|| format!("__launch_bounds__({}): write the number of threads as a literal", first.join(" ")))
}

/// Index of the parenthesis that closes the one at `open`.
fn closing(tokens: &[String], open: usize) -> Result<usize, String> {
    if tokens.get(open).map(String::as_str) != Some("(") {
        return Err(format!("expected ( behind {}", tokens.get(open.wrapping_sub(1)).map_or("", |t| t)));
    }
    let mut depth = 0usize;
    for (i, token) in tokens.iter().enumerate().skip(open) {
        match token.as_str() {
            "(" => depth += 1,
            ")" if depth == 1 => return Ok(i),
            ")" => depth -= 1,
            _ => {}
        }
    }
    Err("unbalanced parentheses".into())
}

/// `struct name { fields } ;` when all fields are plain; anything else is no parameter struct.
fn parse_struct(tokens: &[String]) -> Option<Struct> {
    let end = tokens.iter().position(|t| t == "}")?;
    let fields: Option<Vec<Field>> =
        tokens[3..end].split(|t| t == ";").filter(|f| !f.is_empty()).map(parse_field).collect();
    Some(Struct { name: tokens[1].clone(), fields: fields? })
}

/// `[const] type [*] [__restrict__] name [ [N] ]`
fn parse_field(tokens: &[String]) -> Option<Field> {
    let text = tokens.join(" ");
    let mut words: Vec<&str> = tokens.iter().map(String::as_str).collect();
    let mut array = None;
    if words.len() > 4 && words.ends_with(&["]"]) {
        let n = words.len();
        if words[n - 3] != "[" {
            return None;
        }
        array = Some(words[n - 2].parse().ok()?);
        words.truncate(n - 3);
    }
    let name = words.pop()?.to_string();
    let is_const = words.first() == Some(&"const");
    words.retain(|w| !matches!(*w, "const" | "__restrict__" | "__grid_constant__"));
    let is_pointer = words.last() == Some(&"*");
    if is_pointer {
        words.pop();
    }
    if words.is_empty() || words.contains(&"*") || words.contains(&"&") {
        return None;
    }
    let ty = match (scalar(&words), is_pointer, is_const) {
        (Some(t), true, true) => Type::ConstPtr(t),
        (Some(t), true, false) => Type::MutPtr(t),
        (Some(t), false, _) => Type::Scalar(t),
        (None, false, _) if words == ["CUtensorMap"] => Type::TensorMap,
        (None, false, _) if words.len() == 1 => Type::Struct(words[0].to_string()),
        _ => return None,
    };
    Some(Field { name, ty, array, text })
}

fn scalar(words: &[&str]) -> Option<&'static str> {
    Some(match words {
        ["float"] => "f32",
        ["double"] => "f64",
        ["bf16" | "__nv_bfloat16"] => "half::bf16",
        ["f16" | "__half"] => "half::f16",
        ["int" | "int32_t"] => "i32",
        ["unsigned" | "uint32_t"] | ["unsigned", "int"] => "u32",
        ["long", "long"] | ["int64_t"] => "i64",
        ["unsigned", "long", "long"] | ["uint64_t" | "size_t"] => "u64",
        ["unsigned", "short"] | ["uint16_t"] => "u16",
        ["unsigned", "char"] | ["uint8_t"] => "u8",
        _ => return None,
    })
}
