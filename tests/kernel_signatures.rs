//! The parser that turns kernel signatures into launch stubs: what it reads, and what it refuses with a message that says what to do.

#[path = "../build/signatures.rs"]
mod signatures;

use signatures::{Type, Unit, check_unique};

fn parse(source: &str) -> Result<Unit, String> {
    Unit::parse("op", source)
}

#[track_caller]
fn refused(source: &str, with: &str) {
    let message = parse(source).err().unwrap_or_else(|| panic!("{source} was accepted"));
    assert!(message.starts_with("kernels/op.cu: ") && message.contains(with), "{message}");
}

#[test]
fn reads_every_kind_of_parameter() {
    let unit = parse(
        r#"
        struct Dropout { const uint32_t* key; uint32_t threshold; float scale; int pads[3]; };
        struct Unused { int x; };
        template <class T> struct Tile { T* p; };
        extern "C" __global__ void __launch_bounds__(32 * 4, 2)
            scale(float* __restrict__ y, const bf16* __restrict__ x, const f16* z, const unsigned char* mask, unsigned long long n,
                  const Dropout d, const __grid_constant__ CUtensorMap map) { if (x) { y[0] = 1; } }
        RM_EXPORT_HOT(scale)
        extern "C" __global__ void none() {}
        RM_EXPORT(none)
        "#,
    )
    .expect("it is inside the grammar");
    assert_eq!(unit.stem, "op");
    let [scale, none] = &unit.kernels[..] else { panic!("two kernels") };
    assert_eq!((scale.name.as_str(), scale.max_threads, scale.hot), ("scale", 128, true));
    assert_eq!((none.name.as_str(), none.max_threads, none.hot, none.params.len()), ("none", 1024, false, 0));
    let names: Vec<&str> = scale.params.iter().map(|p| p.name.as_str()).collect();
    assert_eq!(names, ["y", "x", "z", "mask", "n", "d", "map"]);
    let types = [
        Type::MutPtr("f32"),
        Type::ConstPtr("half::bf16"),
        Type::ConstPtr("half::f16"),
        Type::ConstPtr("u8"),
        Type::Scalar("u64"),
        Type::Struct("Dropout".into()),
        Type::TensorMap,
    ];
    assert!(scale.params.iter().map(|p| &p.ty).eq(&types));
    let [dropout] = &unit.structs[..] else { panic!("only the struct that a kernel takes") };
    assert_eq!(dropout.name, "Dropout");
    assert!(dropout.fields[0].ty == Type::ConstPtr("u32") && dropout.fields[3].array == Some(3));
    assert_eq!(scale.params[0].text, "float * __restrict__ y");
}

#[test]
fn refuses_what_cannot_cross_the_launch_boundary() {
    let kernel = |params: &str| format!("extern \"C\" __global__ void k({params}) {{}} RM_EXPORT(k)");
    refused(&kernel("float** y"), "cannot pass `float * * y`");
    refused(&kernel("float& y"), "cannot pass `float & y`");
    refused(&kernel("std::string s"), "cannot pass");
    refused(&kernel("Unknown u"), "Unknown is neither a known type nor a plain struct");
    refused("struct S { float** p; }; extern \"C\" __global__ void k(S s) {} RM_EXPORT(k)", "S is neither");
}

#[test]
fn refuses_kernels_that_nobody_could_launch() {
    refused("extern \"C\" __global__ void k(int n) {}", "k has no RM_EXPORT");
    refused("extern \"C\" __global__ void k(int n) {} RM_EXPORT(k) RM_EXPORT(k)", "exported twice");
    refused("RM_EXPORT(ghost)", "RM_EXPORT(ghost) names no");
    refused(
        "extern \"C\" __global__ void __launch_bounds__(N) k(int n) {} RM_EXPORT(k)",
        "write the number of threads as a literal",
    );
    refused("extern \"C\" __global__ void k(int n", "unbalanced parentheses");
}

#[test]
fn one_name_belongs_to_one_file() {
    let unit = |stem| {
        Unit::parse(stem, "extern \"C\" __global__ void k(int n) {} RM_EXPORT(k)").expect("it is inside the grammar")
    };
    let message = check_unique(&[unit("a"), unit("b")]).expect_err("the name is taken");
    assert!(message.contains("kernels/b.cu: k is also in kernels/a.cu"), "{message}");
    assert!(check_unique(&[unit("a")]).is_ok());
}
