from llm_tools.command import entry

entry()
