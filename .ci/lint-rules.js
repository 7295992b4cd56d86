// House rules that the linter lacks, as its plugin; the interface is ESLint's.

/** No `a = b = c`, `if (a = b)`, `act(a = 1)`, `() => (a = 1)`, `${a = 1}`, `act(a++)`. */
function noInnerAssignment(context) {
  const check = (node) => {
    const { parent } = node
    if (parent.type === 'ExpressionStatement') return
    if (parent.type === 'ForStatement' && parent.test !== node) return
    context.report({ node, message: 'Let an assignment be a statement of its own.' })
  }
  return { AssignmentExpression: check, UpdateExpression: check }
}

/** No `a ? b : c ? d : e`, nor a ternary in the parentheses, arguments or template of another. */
function noInnerTernary(context) {
  return {
    ConditionalExpression(node) {
      const ancestors = context.sourceCode.getAncestors(node).reverse()
      const end = ancestors.findIndex(({ type }) => /Statement|Declaration|Function/.test(type))
      const expressions = ancestors.slice(0, end)
      if (expressions.some(({ type }) => type === node.type)) {
        context.report({ node, message: 'One ternary in an expression is enough.' })
      }
    }
  }
}

/** No `const [a, b] = [1, 2]` and no `[a, b] = [b, a]`. */
function noPackedDeclaration(context) {
  const check = (node, target, value) => {
    const isPacked =
      (target.type === 'ArrayPattern' && value?.type === 'ArrayExpression') ||
      (target.type === 'ObjectPattern' && value?.type === 'ObjectExpression')
    if (isPacked) context.report({ node, message: 'Declare or assign one name at a time.' })
  }
  return {
    VariableDeclarator: (node) => check(node, node.id, node.init),
    AssignmentExpression: (node) => check(node, node.left, node.right)
  }
}

/** No `Object.assign(state, { a, b })`; into an object that is made there and then is fine. */
function noObjectAssign(context) {
  return {
    CallExpression(node) {
      if (context.sourceCode.getText(node.callee) !== 'Object.assign') return
      if (!['Identifier', 'MemberExpression'].includes(node.arguments[0]?.type)) return
      context.report({ node, message: 'Assign field by field.' })
    }
  }
}

/** No `for (…) if (…) act()` and the like: what holds another statement has braces. */
function noBareNesting(context) {
  const check = ({ body }) => {
    if (!/^(If|For|ForIn|ForOf|While|DoWhile|Switch|Try)Statement$/.test(body.type)) return
    context.report({ node: body, message: 'Put braces around a statement that holds others.' })
  }
  return {
    IfStatement: ({ consequent }) => check({ body: consequent }),
    ForStatement: check,
    ForInStatement: check,
    ForOfStatement: check,
    WhileStatement: check
  }
}

export default {
  meta: { name: 'house' },
  rules: {
    'no-bare-nesting': { create: noBareNesting },
    'no-inner-assignment': { create: noInnerAssignment },
    'no-inner-ternary': { create: noInnerTernary },
    'no-object-assign': { create: noObjectAssign },
    'no-packed-declaration': { create: noPackedDeclaration }
  }
}
