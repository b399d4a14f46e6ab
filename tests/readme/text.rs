//! The README, taken apart: blocks of code, the commands in them, words in code.

/// The README.
pub fn readme() -> String {
    std::fs::read_to_string(std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap()
}

/// Code between fences, or indented.
pub struct Block {
    /// As the fence names it; empty where it names none and of indented code.
    pub language: String,
    /// The code.
    pub text: String,
}

/// All blocks, in their order.
pub fn blocks(readme: &str) -> Vec<Block> {
    let (mut found, mut open): (Vec<Block>, Option<Block>) = (Vec::new(), None);
    let mut indented = false;
    for line in readme.lines() {
        match (&mut open, line.strip_prefix("```")) {
            (Some(_), Some(_)) => found.extend(open.take()),
            (None, Some(language)) => open = Some(Block { language: language.into(), text: String::new() }),
            (Some(block), None) => block.text += &format!("{line}\n"),
            (None, None) => match (line.strip_prefix("    "), indented, found.last_mut()) {
                (Some(code), true, Some(block)) => block.text += &format!("{code}\n"),
                (Some(code), ..) => found.push(Block { language: String::new(), text: format!("{code}\n") }),
                _ => {}
            },
        }
        indented = open.is_none() && line.starts_with("    ");
    }
    assert!(open.is_none(), "a fence is not closed");
    found
}

/// The commands: all of fenced blocks without a language, and what begins like one in indented blocks, which also hold output.
pub fn commands(readme: &str) -> Vec<String> {
    let programs = ["retromae-engine ", "cargo ", "torchrun ", "pip ", "python3 ", "git ", "bash "];
    let mut found = Vec::new();
    for block in blocks(readme).into_iter().filter(|block| block.language.is_empty()) {
        let fenced = readme.contains(&format!("```\n{}```", block.text));
        let joined = block.text.replace("\\\n", " ");
        let lines = joined.lines().map(|line| line.split("  #").next().unwrap().trim());
        let lines = lines
            .filter(|line| !line.is_empty() && (fenced || programs.iter().any(|program| line.starts_with(program))));
        found.extend(lines.map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")));
    }
    found
}

/// The words between backticks, and those of blocks that hold commands, without the values behind `=` and marks at their ends.
pub fn code_words(readme: &str) -> Vec<String> {
    let (mut code, mut fenced) = (commands(readme).join(" "), false);
    for line in readme.lines() {
        if line.starts_with("```") {
            fenced = !fenced;
        } else if !fenced {
            line.split('`').skip(1).step_by(2).for_each(|span| code += &format!(" {span}"));
        }
    }
    let bare = |word: &str| {
        word.split(['=', '|', '\\', ':'])
            .next()
            .unwrap_or("")
            .trim_matches(['(', ')', ',', ';', '.', '…', '"', '\''])
            .to_string()
    };
    code.split_whitespace().map(bare).filter(|word| !word.is_empty()).collect()
}

#[test]
fn blocks_and_commands_are_found() {
    let text = "a `--flag x`\n\n```\nretromae-engine a \\\n    --b c     # why\nother d\n```\n\n    retromae-engine e  f\n    42 rows\n\n\
                ```python\nimport x\n```\n";
    assert_eq!(commands(text), ["retromae-engine a --b c", "other d", "retromae-engine e f"]);
    let languages: Vec<String> = blocks(text).into_iter().map(|block| block.language).collect();
    assert_eq!(languages, ["", "", "python"]);
    assert!(code_words(text).contains(&"--flag".to_string()) && code_words(text).contains(&"--b".to_string()));
}
